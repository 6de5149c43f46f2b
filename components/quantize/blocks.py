"""Quantize a model's parts, one at a time: what lies outside its blocks, then each block; check them and write them."""

import copy
import functools
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from components.core.blocks import matrices, routing, stack_names
from components.core.checkpoint.saving import part_file, save_tensors
from components.core.mask.integrity import enforce, integrity
from components.core.mask.mask import Mask
from components.core.mask.prunable import head_name, prunable_weights
from components.core.progress import track
from components.core.walk.stream import Stream
from components.core.walk.walk import ReplayError, Walk
from components.core.walk.work import Work
from components.quantize.config import QuantizeConfig
from components.quantize.part import Part


def quantize_model(
    walk: Walk, work: Work, engine: ModuleType, config: QuantizeConfig, mask: Mask | None, calibration: Tensor | None
) -> None:
    """Quantize a model and write it, part by part, to the work's folder; goes on after the parts that are finished.

    Args:
        walk: the model.
        work: has, for each finished part, `weights` and `zeros` (their numbers under the mask) and `sparse_integrity_check`.
            The first part is what lies outside the blocks, then comes a part for each block.
        engine: a module such as `with_quanto`.
        config: the stage's settings.
        mask: which weights must be zero; None = those that are zero before.
        calibration: ids [nsamples, seq_len] of the text that rounding needs, or None.

    Raises:
        SparsityError: a weight outside the mask is not zero.
        ValueError: there is calibration text, and the model's blocks cannot be run one by one.
    """
    text = begin(walk, work.folder, calibration, fresh=not work.results)
    layers = [(index, matrix.layer) for index, block in enumerate(walk.blocks) for matrix in matrices(block).values()]
    inside = [f"{walk.name}.{index}.{layer}" for index, layer in layers]
    numbers = range(len(work.results), walk.parts)
    for number in track(numbers, "quantizing", len(numbers)):
        index = number - 1
        # the engine changes a copy, made while it takes no memory, so that the walk's own model stays as it is
        copied = copy.deepcopy(walk.blocks[index] if number else walk.model)
        name = f"{walk.name}.{index}" if number else ""
        prefix = f"{name}." if number else ""
        with walk.part(number) as dense:
            own = {inner.removeprefix(prefix): tensor for inner, tensor in dense.items()}
            copied.load_state_dict(
                own, strict=False, assign=True
            )  # the same tensors, so what is rounded in place is so in both
            kept = places(walk, dense, mask)
            there = {inner.removeprefix(prefix): tensor.to(walk.device) for inner, tensor in kept.items()}
            part = Part(name, copied, there, [] if number else [head_name(walk.model), *inside], words(walk))
            if text and number:
                part = replace(part, batches=functools.partial(text.batches, index, walk.device))
            made = {f"{prefix}{inner}": tensor for inner, tensor in engine.quantize(part, config).items()}
            result = write_part(walk, work, engine, made, Mask(kept, sparsity=mask.sparsity if mask else None))
            if text and number:
                walk.advance(text, index)
        states = [text.before(number)] if text else []
        work.commit(result, [part_file(work.folder, number)], states)


def begin(walk: Walk, folder: Path, calibration: Tensor | None, fresh: bool) -> Stream | None:
    """Begin the walk of calibration text, if there is any.

    Raises:
        ValueError: the model's blocks cannot be run one by one.
    """
    if calibration is None:
        return None
    if fresh:
        try:
            walk.check()
        except ReplayError as error:
            raise ValueError(f"rounding must be nearest for this model, got gptq: {error}") from error
    with walk.outside():
        return walk.record(calibration, folder, "calibration", fresh)


def words(walk: Walk) -> frozenset[str]:
    """Names of the weights of embedding and head."""
    ends = (walk.model.get_input_embeddings(), walk.model.get_output_embeddings())
    return frozenset(
        name for name, tensor in walk.model.state_dict(keep_vars=True).items() if any(tensor is end.weight for end in ends)
    )


def places(walk: Walk, dense: dict[str, Tensor], mask: Mask | None) -> dict[str, Tensor]:
    """Which weights of a part are kept, bool on the CPU, by name.

    Args:
        walk: the model.
        dense: the part's tensors.
        mask: see `quantize_model`.

    Raises:
        SparsityError: one that is not kept is not zero.
    """
    names = [name for name in prunable_weights(walk.model) if name in dense and (mask is None or name in mask.tensors)]
    kept = {name: dense[name].cpu() != 0 if mask is None else mask.tensors[name] for name in names}
    enforce(integrity({name: dense[name] for name in names}, Mask(kept)))
    return kept


def check_stored_experts(walk: Walk) -> None:
    """Raise ValueError if a model's checkpoints store the matrices of all experts as one tensor: there is no format for it."""
    names = {f"{walk.name}.{index}.{name}" for index, block in enumerate(walk.blocks) for name in stack_names(block)}
    stored = walk.weights.stored_names({name: walk.model.get_parameter(name) for name in sorted(names)})
    for name, tensor in stored.items():
        if tensor.ndim != 2:
            raise ValueError(
                "model_dir must store each expert's matrices by themselves to be quantized; "
                f"{name} {list(tensor.shape)} has those of all"
            )


def not_quantized(walk: Walk) -> list[str]:
    """Names of the layers that stay as they are: the head, and what chooses among experts."""
    routers = [f"{walk.name}.{index}.{name}" for index, block in enumerate(walk.blocks) for name in sorted(routing(block))]
    return [head_name(walk.model), *(name.removesuffix(".weight") for name in routers)]


@torch.no_grad()
def write_part(walk: Walk, work: Work, engine: ModuleType, made: dict[str, Tensor], mask: Mask) -> dict[str, Any]:
    """Check and write a quantized part of a model; returns its result, see `quantize_model`.

    Args:
        walk: see `quantize_model`.
        work: see `quantize_model`.
        engine: see `quantize_model`.
        made: what the engine has made of the part's tensors.
        mask: of the part.
    """
    stored = {name: engine.stored(made, name) for name in mask.tensors}
    alone = {name: found.places for name, found in stored.items() if found.places is not None}
    check = integrity({name: found.data for name, found in stored.items()}, mask, places=alone)
    enforce(check)
    save_tensors(engine.named(walk.weights, made), part_file(work.folder, len(work.results)))
    weights = sum(tensor.numel() for tensor in mask.tensors.values())
    zeros = weights - sum(int(tensor.sum()) for tensor in mask.tensors.values())
    return {"weights": weights, "zeros": zeros, "sparse_integrity_check": check}
