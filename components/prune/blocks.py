"""Prune a model's blocks, one at a time: calibrate, prune, check, write, and let the text go on through what was pruned.

The dense model's perplexity is measured on the way: its evaluation text goes through each block before it is pruned.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.checkpoint.saving import parameters_outside, part_file, save_tensors
from components.core.checks import parse_pattern
from components.core.mask.integrity import enforce, integrity
from components.core.mask.mask import Mask, save_mask_part
from components.core.perplexity import from_losses
from components.core.processes import from_all, is_main, process_count, rank, spread, together
from components.core.progress import track
from components.core.walk.stream import Stream
from components.core.walk.walk import Walk
from components.core.walk.work import SharedWork
from components.prune.calibration import hessians, observe
from components.prune.config import PruneConfig
from components.prune.magnitude import magnitude
from components.prune.sparsegpt import sparsegpt


def mask_part(folder: Path, index: int) -> Path:
    """The file with a block's part of the mask."""
    return folder / f"mask-{index:05d}.safetensors"


@dataclass(frozen=True)
class Texts:
    """What goes through the blocks in this process: its share of the rows.

    Attributes:
        calibration: through the pruned blocks.
        dense: evaluation text, through the dense blocks; None = perplexity is not measured, or this process has no row of it.
        pruned: the same, through the pruned blocks.
    """

    calibration: Stream
    dense: Stream | None = None
    pruned: Stream | None = None

    def streams(self) -> list[Stream]:
        """All of them."""
        return [stream for stream in (self.calibration, self.dense, self.pruned) if stream]


def prune_model(
    walk: Walk, work: SharedWork, calibration: Tensor, evaluation: Tensor | None, config: PruneConfig
) -> dict[str, float]:
    """Prune a model and write it, part by part, to the work's folder; goes on after the blocks that are finished.

    Every process calls this. Each runs its share of the texts and prunes its share of a block's layers; the first one writes.

    Args:
        walk: the dense model.
        work: has, for each finished block, `layers` (one entry per linear layer: name, block, linear, shape, sparsity,
            relative_error, seconds) and `sparse_integrity_check`.
        calibration: ids [nsamples, seq_len].
        evaluation: ids [blocks, seq_len], or None.
        config: the stage's settings.

    Returns:
        `perplexity_before` and `perplexity`, unless there is no evaluation text.

    Raises:
        ValueError: the model cannot be pruned.
        SparsityError: a pruned weight is not zero, or a kept one not finite.
    """
    done = len(work.results)
    with together():
        texts = begin(walk, work.folder, calibration, evaluation, fresh=done == 0)
    for index in track(range(done, len(walk.blocks)), "pruning blocks", len(walk.blocks) - done):
        with walk.block(index) as block:
            result = prune_block(walk, block, index, texts, work.folder, config)
        files = [part_file(work.folder, index + 1), mask_part(work.folder, index)]
        states = [stream.before(index + 1) for stream in texts.streams()]
        work.commit(result, [part_file(work.folder, 0), *files] if index == 0 else files, states)
    if evaluation is None:
        return {}
    with together(), walk.outside():
        found = [walk.losses(stream).cpu() for stream in (texts.dense, texts.pruned) if stream]
    losses = [torch.cat(parts) for parts in zip(*filter(None, from_all(found)), strict=True)]  # all rows, in their order
    with together():
        return dict(zip(("perplexity_before", "perplexity"), (from_losses(each, evaluation) for each in losses), strict=True))


def begin(walk: Walk, folder: Path, calibration: Tensor, evaluation: Tensor | None, fresh: bool) -> Texts:
    """Check the model and write what lies outside its blocks, unless an earlier process has; returns this process's texts."""
    if fresh:
        walk.check()
    with walk.outside():
        if fresh and is_main():
            outside = walk.weights.stored_names(parameters_outside(walk.model, walk.blocks))
            save_tensors(outside, part_file(folder, 0))
        texts = Texts(walk.record(share(calibration), folder, f"calibration-{rank()}", fresh))
        if evaluation is None or not len(share(evaluation)):
            return texts
        dense = walk.record(share(evaluation), folder, f"dense-{rank()}", fresh)
        return Texts(texts.calibration, dense, walk.twin(dense, folder, f"pruned-{rank()}", fresh))


def share(rows: Tensor) -> Tensor:
    """This process's share of the rows of a text."""
    return rows.tensor_split(process_count())[rank()]


def prune_block(walk: Walk, block: nn.Module, index: int, texts: Texts, folder: Path, config: PruneConfig) -> dict[str, Any]:
    """Prune a block's linear layers, write them with their mask, and let the texts go through; returns the block's result."""
    prefix = f"{walk.name}.{index}"
    with together():
        if texts.dense:
            walk.advance(texts.dense, index)
        observed = observe(block, texts.calibration.batches(index, walk.device))
    groups = hessians(block, observed, prefix)
    masks: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    with together():
        for group in groups:
            if group.hessian is not None:
                for name, (mask, layer) in prune_group(block, group.names, group.hessian, prefix, config).items():
                    masks[name] = mask
                    layers.append({"name": f"{prefix}.{name}.weight", "block": index, "linear": name, **layer})
    kept: dict[str, Tensor] = {}
    for group in groups:
        for name in group.names:
            weight = block.get_parameter(f"{name}.weight").data
            mask = masks[name] if name in masks else torch.empty_like(weight, dtype=torch.bool)  # pruned elsewhere
            spread(weight, group.process)
            spread(mask, group.process)
            kept[f"{prefix}.{name}.weight"] = mask.cpu()
    found = {layer["name"]: layer for layers_of_one in from_all(layers) for layer in layers_of_one}
    with together():
        state = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
        check = integrity(state, Mask(kept, config.pattern, config.sparsity))
        enforce(check)
        if is_main():
            save_tensors(walk.weights.stored_names(state), part_file(folder, index + 1))
            save_mask_part(kept, mask_part(folder, index))
        for text in (texts.calibration, texts.pruned):
            if text:
                walk.advance(text, index)
    return {"layers": [found[name] for name in kept], "sparse_integrity_check": check}


def prune_group(
    block: nn.Module, names: list[str], hessian: Tensor, prefix: str, config: PruneConfig
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Prune a block's layers that have the same inputs, in place; returns name → mask [out, in], and what is to be known."""
    start = time.monotonic()
    weights = [block.get_parameter(f"{name}.weight").data for name in names]
    found = prune_layers(weights, hessian, config, ", ".join(f"{prefix}.{name}" for name in names))
    errors = [relative_error(dense, new, hessian) for dense, (new, _) in zip(weights, found, strict=True)]
    seconds = round((time.monotonic() - start) / len(names), 4)
    pruned = {}
    for name, weight, (new, mask), error in zip(names, weights, found, errors, strict=True):
        weight.copy_(new)
        sparsity = 1 - int(mask.sum()) / mask.numel()
        layer = {"shape": list(mask.shape), "sparsity": sparsity, "relative_error": error, "seconds": seconds}
        pruned[name] = mask, layer
    return pruned


def prune_layers(weights: list[Tensor], hessian: Tensor, config: PruneConfig, what: str) -> list[tuple[Tensor, Tensor]]:
    """Prune layers with the same inputs by the method that is set; arguments and result as for `sparsegpt`."""
    n_of_m = parse_pattern(config.pattern)
    if config.method == "magnitude":
        return [magnitude(weight, config.sparsity, n_of_m) for weight in weights]
    return sparsegpt(weights, hessian, config.sparsity, n_of_m, damping=config.damping, block_size=config.block_size, what=what)


@torch.no_grad()
def relative_error(dense: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """‖WX − ŴX‖² / ‖WX‖², computed from the Hessian XXᵀ [in, in]; weights [out, in]."""
    dense = dense.float()
    change = sparse - dense
    moved = torch.einsum("oi,oi->", change @ hessian, change)
    return float(moved / torch.einsum("oi,oi->", dense @ hessian, dense).clamp_min(torch.finfo(torch.float32).tiny))
