"""Prune a model's blocks, one at a time: calibrate, prune, check, write, and let the text go on through what was pruned.

The dense model's perplexity is measured on the way: its evaluation text goes through each block before it is pruned.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.checkpoint.saving import parameters_outside, part_file, save_tensors
from components.core.checks import parse_pattern
from components.core.mask.integrity import enforce, integrity
from components.core.mask.mask import Mask, save_mask_part
from components.core.perplexity import from_losses
from components.core.progress import track
from components.core.walk.stream import Stream
from components.core.walk.walk import Walk
from components.core.walk.work import Work
from components.prune.calibration import hessians
from components.prune.config import PruneConfig
from components.prune.magnitude import magnitude
from components.prune.sparsegpt import sparsegpt


def mask_part(folder: Path, index: int) -> Path:
    """The file with a block's part of the mask."""
    return folder / f"mask-{index:05d}.safetensors"


@dataclass(frozen=True)
class Texts:
    """What goes through the blocks.

    Attributes:
        calibration: through the pruned blocks.
        dense: evaluation text, through the dense blocks; None = perplexity is not measured.
        pruned: the same, through the pruned blocks.
    """

    calibration: Stream
    dense: Stream | None = None
    pruned: Stream | None = None

    def streams(self) -> list[Stream]:
        """All of them."""
        return [stream for stream in (self.calibration, self.dense, self.pruned) if stream]


def prune_model(
    walk: Walk, work: Work, calibration: Tensor, evaluation: Tensor | None, config: PruneConfig
) -> dict[str, float]:
    """Prune a model and write it, part by part, to the work's folder; goes on after the blocks that are finished.

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
    fresh = done == 0
    if fresh:
        walk.check()
    with walk.outside():
        if fresh:
            outside = walk.weights.stored_names(parameters_outside(walk.model, walk.blocks))
            save_tensors(outside, part_file(work.folder, 0))
        texts = Texts(walk.record(calibration, work.folder, "calibration", fresh))
        if evaluation is not None:
            dense = walk.record(evaluation, work.folder, "dense", fresh)
            texts = Texts(texts.calibration, dense, walk.twin(dense, work.folder, "pruned", fresh))
    for index in track(range(done, len(walk.blocks)), "pruning blocks", len(walk.blocks) - done):
        with walk.block(index) as block:
            result = prune_block(walk, block, index, texts, work.folder, config)
        files = [part_file(work.folder, index + 1), mask_part(work.folder, index)]
        states = [stream.before(index + 1) for stream in texts.streams()]
        work.commit(result, [part_file(work.folder, 0), *files] if index == 0 else files, states)
    if texts.dense is None or texts.pruned is None or evaluation is None:
        return {}
    with walk.outside():
        return {
            "perplexity_before": from_losses(walk.losses(texts.dense), evaluation),
            "perplexity": from_losses(walk.losses(texts.pruned), evaluation),
        }


def prune_block(walk: Walk, block: nn.Module, index: int, texts: Texts, folder: Path, config: PruneConfig) -> dict[str, Any]:
    """Prune a block's linear layers, write them with their mask, and let the texts go through; returns the block's result."""
    if texts.dense:
        walk.advance(texts.dense, index)
    prefix = f"{walk.name}.{index}"
    kept: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    hessian_of = hessians(block, texts.calibration.batches(index, walk.device), prefix)
    layer_of = linears(block)
    for names in sharing(hessian_of):
        start = time.monotonic()
        hessian, dense = hessian_of[names[0]], [layer_of[name].weight for name in names]
        found = prune_layers(dense, hessian, config, ", ".join(f"{prefix}.{name}" for name in names))
        errors = [relative_error(weight, new, hessian) for weight, (new, _) in zip(dense, found, strict=True)]
        seconds = round((time.monotonic() - start) / len(names), 4)
        for linear, (weight, mask), error in zip(names, found, errors, strict=True):
            layer_of[linear].weight.data.copy_(weight)
            kept[f"{prefix}.{linear}.weight"] = mask.cpu()
            layers.append(
                {
                    "name": f"{prefix}.{linear}.weight",
                    "block": index,
                    "linear": linear,
                    "shape": list(mask.shape),
                    "sparsity": 1 - int(mask.sum()) / mask.numel(),
                    "relative_error": error,
                    "seconds": seconds,
                }
            )
    state = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
    check = integrity(state, Mask(kept, config.pattern, config.sparsity))
    enforce(check)
    save_tensors(walk.weights.stored_names(state), part_file(folder, index + 1))
    save_mask_part(kept, mask_part(folder, index))
    for text in (texts.calibration, texts.pruned):
        if text:
            walk.advance(text, index)
    return {"layers": layers, "sparse_integrity_check": check}


def sharing(hessian_of: dict[str, Tensor]) -> list[list[str]]:
    """Names of layers, those with the same Hessian together."""
    groups: dict[int, list[str]] = {}
    for name, hessian in hessian_of.items():
        groups.setdefault(id(hessian), []).append(name)
    return list(groups.values())


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
