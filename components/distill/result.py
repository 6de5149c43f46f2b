"""Write what a training has made: the student with its mask, its record and its curves."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core.checkpoint.saving import finish_checkpoint
from components.core.files import new_directory_and_work
from components.core.history import History, StageRecord, Stopwatch, write_history
from components.core.mask.file import MASK_FILE, fingerprint_of_file
from components.core.mask.integrity import combined, enforce, integrity
from components.core.mask.mask import Mask, join_mask, save_mask_part
from components.core.progress import log
from components.core.walk.measure import measure
from components.core.walk.rewrite import rewrite_part
from components.core.walk.walk import Walk
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig
from components.distill.loop import Progress


def write(
    config: DistillConfig,
    result: StageRecord,
    history: History,
    backend: SingleProcess,
    mask: Mask,
    tokenizer: Any,
    evaluation: Tensor | None,
    watch: Stopwatch,
) -> None:
    """Write the student with its trained weights and its mask, and its record with the perplexity of what was written.

    Every process must call this: the weights of one part after another are gathered on all, and the first process writes them.

    Raises:
        SparsityError: a weight outside the mask is not zero, and `fail_on_sparse_violation` is set.
    """
    dtype, trust, writes = backend.compute_dtype, config.trust_remote_code, backend.rank == 0
    walk = Walk("student_model", config.student_model, dtype, torch.device("cpu"), trust)
    names_of: dict[int, list[str]] = {number: [] for number in range(walk.parts)}
    for name in backend.parameters:
        names_of[walk.part_of(name)].append(name)
    checks, files, masks = [], [], []
    shapes: dict[str, list[int]] = {}
    shared = kept = 0
    with contextlib.ExitStack() as stack:
        if writes:
            scratch, place = stack.enter_context(new_directory_and_work(config.output_dir, config.output_mask_file))
        for number, names in names_of.items():
            weights = {name: backend.full(name).to(dtype) for name in names}
            given = found = mask.only(names)
            if backend.admm:
                found = replace(given, tensors=backend.admm.support(weights))
                shared += sum(int((found.tensors[name] & given.tensors[name]).sum()) for name in names)
                kept += sum(int(given.tensors[name].sum()) for name in names)
            if names:
                checks.append(integrity(weights, found, config.sparse_check_eps))
            if writes:
                files.append(rewrite_part(walk, number, weights, place))
                masks.append(place / f"mask-{number:05d}.safetensors")
                save_mask_part(found.tensors, masks[-1])
                shapes |= {name: list(weight.shape) for name, weight in weights.items()}
        if backend.admm:
            result.measured["mask_overlap"] = shared / kept
        result.sparse_integrity_check = combined(checks, mask.realised_sparsity())
        if config.fail_on_sparse_violation:
            enforce(result.sparse_integrity_check)
        if not writes:
            return
        finish_checkpoint(walk.model, tokenizer, files, dtype, scratch)
        mask_file = place / Path(config.output_mask_file).name if config.output_mask_file else scratch / MASK_FILE
        join_mask(masks, mask_file, mask.pattern, mask.sparsity, shapes)
        result.measured["mask"] = fingerprint_of_file(mask_file)
        if evaluation is not None:
            ppl = measure("student_model", scratch, evaluation, dtype, backend.device, place / "measured", trust)
            result.measured["perplexity"] = ppl
        result.measured |= watch.read()
        write_history(scratch, history, result, config.student_model)
    log(f"distilled in {result.measured['seconds']:.0f} s: {config.output_dir}")


def write_tensorboard(folder: str, progress: Progress) -> None:
    """Write the curves as TensorBoard files."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for entry in progress.steps:
            for name in entry.keys() - {"step"}:
                writer.add_scalar(f"train/{name}", entry[name], int(entry["step"]))
        for entry in progress.epochs:
            writer.add_scalar("eval/perplexity", entry["eval_ppl"], int(entry["epoch"]))
