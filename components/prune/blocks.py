"""Prune a model's blocks, one at a time: calibrate, prune, check, write, and let the text go on through what was pruned.

The dense model's perplexity is measured on the way: its evaluation text goes through each block before it is pruned.
"""

import copy
import functools
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import Matrix, is_named, matrices, weights_of
from components.core.checkpoint.saving import parameters_outside, part_file, save_tensors
from components.core.device import fast_dtype
from components.core.mask.integrity import enforce, integrity
from components.core.mask.mask import Mask, save_mask_part
from components.core.perplexity import from_losses
from components.core.processes import from_all, is_main, process_count, rank, spread, together
from components.core.progress import log, track
from components.core.walk.stream import Batch, Stream, run_block
from components.core.walk.walk import Walk
from components.core.walk.work import SharedWork
from components.prune.calibration import Group, hessians, in_order, observe
from components.prune.config import PruneConfig
from components.prune.layers import prune_idle, prune_layers
from components.prune.recipe import recipe_of
from components.prune.reconstruct import TOKENS_PER_STEP, reconstruct


def mask_part(folder: Path, index: int) -> Path:
    """The file with a block's part of the mask."""
    return folder / f"mask-{index:05d}.safetensors"


@dataclass(frozen=True)
class Texts:
    """What goes through the blocks in this process: its share of the rows.

    Attributes:
        calibration: through the pruned blocks.
        reference: the same, through the dense blocks; None = the recipe does not need it.
        dense: evaluation text, through the dense blocks; None = perplexity is not measured, or this process has no row of it.
        pruned: the same, through the pruned blocks.
    """

    calibration: Stream
    reference: Stream | None = None
    dense: Stream | None = None
    pruned: Stream | None = None

    def streams(self) -> list[Stream]:
        """All of them."""
        return [stream for stream in (self.calibration, self.reference, self.dense, self.pruned) if stream]


def prune_model(
    walk: Walk,
    work: SharedWork,
    calibration: Tensor,
    evaluation: Tensor | None,
    sparsities: Mapping[str, float],
    config: PruneConfig,
) -> dict[str, float]:
    """Prune a model and write it, part by part, to the work's folder; goes on after the blocks that are finished.

    Every process calls this. Each runs its share of the texts and prunes its share of a block's layers; the first one writes.

    Args:
        walk: the dense model.
        work: has, for each finished block, `layers` (one entry per matrix: name, block, linear, shape, sparsity, seconds,
            tokens, and what `prune_layers` has measured), `shapes` (of the masked parameters, by name),
            `sparse_integrity_check`, and `reconstruction`, the error of a block that was trained before and after.
        calibration: ids [nsamples, seq_len].
        evaluation: ids [blocks, seq_len], or None.
        sparsities: the share of zeros that each parameter is to have, by name.
        config: the stage's settings.

    Returns:
        `perplexity_before` and `perplexity`, unless there is no evaluation text.

    Raises:
        ValueError: the model cannot be pruned.
        SparsityError: a pruned weight is not zero, or a kept one not finite.
    """
    done = len(work.results)
    with together():
        texts = begin(walk, work.folder, calibration, evaluation, config, fresh=done == 0)
    for index in track(range(done, len(walk.blocks)), "pruning blocks", len(walk.blocks) - done):
        with walk.block(index) as block:
            result = prune_block(walk, block, index, texts, sparsities, work.folder, config)
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


def begin(walk: Walk, folder: Path, calibration: Tensor, evaluation: Tensor | None, config: PruneConfig, fresh: bool) -> Texts:
    """Check the model and write what lies outside its blocks, unless an earlier process has; returns this process's texts."""
    if fresh:
        walk.check()
    with walk.outside():
        if fresh and is_main():
            outside = walk.weights.stored_names(parameters_outside(walk.model, walk.blocks))
            save_tensors(outside, part_file(folder, 0))
        recipe = recipe_of(config)
        tokens = TOKENS_PER_STEP // process_count() if recipe.reconstruct == "block" else None
        recorded = walk.record(share(calibration), folder, f"calibration-{rank()}", fresh, tokens)
        texts = Texts(made_fast(recorded, walk, config))
        if recipe.needs_dense:
            texts = replace(texts, reference=walk.twin(texts.calibration, folder, f"reference-{rank()}", fresh))
        if evaluation is None or not len(share(evaluation)):
            return texts
        dense = walk.record(share(evaluation), folder, f"dense-{rank()}", fresh)
        return replace(texts, dense=dense, pruned=walk.twin(dense, folder, f"pruned-{rank()}", fresh))


@torch.no_grad()
def made_fast(text: Stream, walk: Walk, config: PruneConfig) -> Stream:
    """Calibration text, to be multiplied in a faster number format if there is one and the model's own code works with it."""
    autocast = fast_dtype(config.dtype, walk.device)
    if autocast is None:
        return text
    rows = text.rows[0]
    hidden = torch.zeros(len(rows), *text.files[0].shape[1:], dtype=walk.dtype, device=walk.device)
    with walk.block(0) as block:
        try:
            run_block(block, Batch(rows, hidden, text.calls[0][0], autocast))
        except RuntimeError:  # such as one that writes what it has multiplied into a tensor of the block's format
            return text
    return replace(text, autocast=autocast)


def share(rows: Tensor) -> Tensor:
    """This process's share of the rows of a text."""
    return rows.tensor_split(process_count())[rank()]


def prune_block(
    walk: Walk,
    block: nn.Module,
    index: int,
    texts: Texts,
    sparsities: Mapping[str, float],
    folder: Path,
    config: PruneConfig,
) -> dict[str, Any]:
    """Prune a block's matrices, write them with their mask, and let the texts go through; returns the block's result."""
    prefix, recipe = f"{walk.name}.{index}", recipe_of(config)
    with together():
        dense = copy.deepcopy(block) if recipe.target == "dense" else None
        for text in (texts.dense, texts.reference):
            if text:
                walk.advance(text, index)
    layers, pruned = Layers(), chosen(block, prefix, config)
    steps = [[*pruned]] if pruned else []
    if recipe.order == "sequential":
        steps = in_order(block, texts.calibration.batches(index, walk.device), pruned)
    for names in steps:
        with together():
            pairs = (dense, texts.reference.batches(index, walk.device)) if dense and texts.reference else None
            observed = observe(block, texts.calibration.batches(index, walk.device), names, pairs)
        refuses = config.idle_experts == "refuse"
        groups = hessians(block, observed, prefix, config.expert_tokens, refuses=refuses)
        prune_groups(block, groups, sparsities, layers, prefix, config)
    result: dict[str, Any] = {}
    masks = parameter_masks(block, layers.masks)
    if recipe.reconstruct == "block" and texts.reference and masks:
        examples = functools.partial(targets, walk, index, texts.calibration, texts.reference)
        before, after = reconstruct(block, examples, masks, epochs=recipe.reconstruct_epochs)
        result["reconstruction"] = {"error_before": before, "error_after": after}
    with together():
        kept = {f"{prefix}.{name}": mask.cpu() for name, mask in masks.items()}
        state = {f"{prefix}.{name}": tensor for name, tensor in block.state_dict().items()}
        check = integrity(state, Mask(kept, config.pattern, sparsities))
        enforce(check)
        if is_main():
            save_tensors(walk.weights.stored_names(state), part_file(folder, index + 1))
            save_mask_part(kept, mask_part(folder, index))
        for text in (texts.calibration, texts.pruned):
            if text:
                walk.advance(text, index)
    where = {name: {"name": f"{prefix}.{name}.weight", "block": index, "linear": name} for name in pruned}
    measured = [place | layers.measured[name] for name, place in where.items()]
    shapes = {name: list(mask.shape) for name, mask in kept.items()}
    return result | {"layers": measured, "shapes": shapes, "sparse_integrity_check": check}


def chosen(block: nn.Module, prefix: str, config: PruneConfig) -> dict[str, Matrix]:
    """The matrices of a block that are pruned: all but those that `ignore` names."""
    ignored = config.ignored()
    return {name: matrix for name, matrix in matrices(block).items() if not is_named(f"{prefix}.{matrix.layer}", ignored)}


@dataclass(frozen=True)
class Layers:
    """The matrices of a block that are pruned: name → mask [out, in], and name → what is to be known."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)


def parameter_masks(block: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name of a parameter → bool mask of its shape, from the masks [out, in] of its matrices."""
    made: dict[str, Tensor] = {}
    for name, matrix in matrices(block).items():
        if name in masks:
            weight = block.get_parameter(matrix.parameter)
            matrix.of(made.setdefault(matrix.parameter, torch.ones_like(weight, dtype=torch.bool))).copy_(masks[name])
    return made


def prune_groups(
    block: nn.Module,
    groups: list[Group],
    sparsities: Mapping[str, float],
    layers: Layers,
    prefix: str,
    config: PruneConfig,
) -> None:
    """Prune groups of a block's matrices in place, each in its process, and add them to `layers` in all."""
    measured: dict[str, dict[str, Any]] = {}
    found, weights = matrices(block), weights_of(block)
    with together():
        for group in groups:
            if group.process != rank():
                continue
            start = time.monotonic()
            dense = [weights[name] for name in group.names]
            what = ", ".join(f"{prefix}.{name}" for name in group.names)
            wanted = [sparsities[f"{prefix}.{found[name].parameter}"] for name in group.names]
            if group.hessian is None:
                log(f"{what} saw {group.tokens} calibration tokens, and is pruned by magnitude", by_any=True)
                made = prune_idle(dense, wanted, config)
            else:
                made = prune_layers(dense, group.hessian, wanted, config, what, group.cross)
            seconds = round((time.monotonic() - start) / len(group.names), 4)
            for name, pruned in zip(group.names, made, strict=True):
                weights[name].copy_(pruned.weight)
                layers.masks[name] = pruned.mask
                sparsity = 1 - int(pruned.mask.sum()) / pruned.mask.numel()
                known = {"shape": list(pruned.mask.shape), "sparsity": sparsity, "seconds": seconds, "tokens": group.tokens}
                measured[name] = known | pruned.measured
    for group in groups:
        for name in group.names:
            if name not in layers.masks:  # pruned elsewhere
                layers.masks[name] = torch.empty_like(weights[name], dtype=torch.bool, memory_format=torch.contiguous_format)
            whole = weights[name].contiguous()  # of a matrix that is stored as [in, out], a copy
            spread(whole, group.process)
            weights[name].copy_(whole)
            spread(layers.masks[name], group.process)
    for found_by_one in from_all(measured):
        layers.measured.update(found_by_one)


def targets(walk: Walk, index: int, calibration: Stream, reference: Stream) -> Iterator[tuple[Batch, Tensor]]:
    """The batches that go into block `index` of the pruned model, each with what the dense model's block has made of its text.

    Processes with fewer batches than others begin again, so that all take the same number of steps.
    """
    count = max(from_all(len(calibration.calls)))
    wanted = reference.before(index + 1)
    for batch in itertools.islice(itertools.cycle(calibration.batches(index, walk.device)), count):
        yield batch, wanted.read(batch.rows, walk.device)
