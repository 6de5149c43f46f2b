"""Load teacher, student and mask; train; check that pruned weights are zero; save with the mask."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core import processes
from components.core.checkpoint.checks import check_dense, check_ids, check_seq_len, inspect_checkpoint, is_quantized
from components.core.checkpoint.files import weight_bytes, weight_files
from components.core.checkpoint.loading import load_tokenizer, open_model
from components.core.device import pick_device, pick_dtype
from components.core.files import check_new, sample_fingerprint
from components.core.history import (
    StageRecord,
    Stopwatch,
    read_history,
    stats_file,
    versions,
)
from components.core.mask.integrity import combined, enforce, integrity
from components.core.mask.mask import Mask, load_mask
from components.core.mask.prunable import check_mask, weight_shapes
from components.core.models import local_folder
from components.core.progress import log_perplexity
from components.core.tokens import bos_for, count_overlaps, id_bytes, load_blocks
from components.core.walk.walk import Walk
from components.distill import launch, resume
from components.distill.admm import counts_of
from components.distill.backends import SingleProcess
from components.distill.before import measure_before
from components.distill.cache import teacher_cache
from components.distill.config import DistillConfig
from components.distill.loop import Progress, Trainer, plan, rows_used
from components.distill.result import write, write_tensorboard
from components.distill.teacher import make_teacher
from components.distill.with_deepspeed import DeepSpeed
from components.distill.with_fsdp import Fsdp

BACKENDS = {"none": SingleProcess, "fsdp": Fsdp, "deepspeed": DeepSpeed}


def run(config: DistillConfig) -> StageRecord:
    """Distil in as many processes as the settings specify, and write the student with its record.

    Raises:
        ValueError: a setting does not fit the models, the mask or the text; raised before any expensive work.
        SparsityError: a weight outside the mask is not zero, and `fail_on_sparse_violation` is set.
    """
    config.check_environment()
    processes.end_with_launcher()
    mask = load_mask(config.mask_file)
    teacher_folder = local_folder(config.teacher_model, parameter="teacher_model")
    student = check_models(config, mask, str(teacher_folder))
    if config.launcher != "python" and not processes.started_already():
        with resume.claim(config):
            pass  # a second run is refused here, in one line; the first of the processes then has the folder
        device = pick_device(config.gpus)
        processes.start(launch.command(config, device.type == "cuda"), config.nproc_per_node, device)
        return StageRecord.load(Path(config.output_dir) / stats_file("distill"))
    with resume.claim(config):
        device = launch.join(config)
        try:
            return train(config, student, mask, teacher_folder, device)
        finally:
            processes.leave()


def train(config: DistillConfig, model_config: Any, mask: Mask, teacher_folder: Path, device: torch.device) -> StageRecord:
    """This process's part of a run; the first process writes the result. `model_config` is the student's configuration."""
    watch = Stopwatch()
    if config.no_mask:
        mask = Mask({name: torch.ones_like(kept) for name, kept in mask.tensors.items()}, sparsity=0.0)
    tokenizer = load_tokenizer(config.student_model, config.trust_remote_code)
    blocks = training_blocks(config, tokenizer)
    check_ids("train_data", blocks, model_config)
    evaluation, overlapping = None, 0
    if not config.skip_ppl_eval:
        evaluation = load_blocks(
            "eval_data", config.eval_data, "eval", tokenizer, config.bos, config.eval_seq_len, config.eval_blocks
        )
        check_ids("eval_data", evaluation.ids, model_config)
        overlapping = count_overlaps("training", blocks, config.eval_data, evaluation)
    dtype = pick_dtype(config.dtype, device, config.student_model)
    config = share_global_batch(config, processes.process_count())
    backend = BACKENDS[config.backend](config, device, dtype)
    _, total_steps = plan(len(blocks), config, backend.world_size)

    walk = Walk("student_model", config.student_model, dtype, torch.device("cpu"), config.trust_remote_code)
    written = walk.disk([evaluation.ids] if evaluation else []) if backend.rank == 0 else 0
    with teacher_cache(config, teacher_folder, blocks, dtype, backend, written) as cache:
        if config.fail_on_sparse_violation:
            check_student(config, mask)
        history, before = read_history(config.student_model), 0.0
        if evaluation and backend.rank == 0:
            before = measure_before(config, history, model_config.dtype, evaluation, dtype, device)
        before = backend.from_first(before)
        torch.manual_seed(config.seed + backend.rank)
        inputs = {
            "mask": mask.fingerprint(),
            "training text": text_of(blocks),
            "teacher": sample_fingerprint(weight_files(teacher_folder)),
            "student": sample_fingerprint(weight_files(Path(config.student_model))),
        }
        used = rows_used(len(blocks), config, backend.world_size)
        teacher = make_teacher(teacher_folder, blocks, used, cache, backend, dtype, config.trust_remote_code)
        student, weights = open_model(config.student_model, torch.float32, device, config.trust_remote_code)
        backend.prepare(student, weights, mask, total_steps)
        trainer = Trainer(backend, teacher, blocks, evaluation.ids if evaluation else None, config, inputs)
        result = StageRecord("distill", asdict(config), versions=versions(), details={"inputs": inputs})
        result.measured["bos"] = bos_for(tokenizer, config.bos)
        if evaluation:
            result.measured |= {
                "perplexity_before": before,
                "perplexity_text": evaluation.fingerprint(),
                "overlapping_eval_blocks": overlapping,
            }
            if backend.rank == 0:
                log_perplexity("finetune_start", before)
        if config.mask == "admm":
            start_dense(config, backend, teacher_folder)
            backend.constrain(mask)
        progress = trainer.fit()
    describe(result, progress, mask)
    write(config, result, history, backend, mask, tokenizer, evaluation.ids if evaluation else None, watch)
    if config.tensorboard_dir and processes.is_main():  # what goes wrong here must not cost the student
        write_tensorboard(config.tensorboard_dir, progress)
    if trainer.remote:
        trainer.remote.close()
    backend.barrier()
    return result


def share_global_batch(config: DistillConfig, processes: int) -> DistillConfig:
    """Settings with `grad_accum_steps` chosen so that a step has `global_batch` blocks, if that is set.

    Raises:
        ValueError: the blocks cannot be divided evenly among the processes.
    """
    if not config.global_batch:
        return config
    at_a_time = max(1, config.batch_size) * processes
    steps, rest = divmod(config.global_batch, at_a_time)
    if rest or not steps:
        raise ValueError(f"global_batch must be a multiple of batch_size * processes = {at_a_time}, got {config.global_batch}")
    return replace(config, grad_accum_steps=steps)


def text_of(blocks: Tensor) -> str:
    """SHA-256 of token blocks."""
    return hashlib.sha256(id_bytes(blocks)).hexdigest()


def training_blocks(config: DistillConfig, tokenizer: Any) -> Tensor:
    """Training tokens [blocks, seq_len], with those of a second corpus mixed in at `mix_ratio`."""
    blocks = load_blocks("train_data", config.train_data, "train", tokenizer, config.bos, config.seq_len).ids
    if not config.mix_data:
        return blocks
    mixed = load_blocks("mix_data", config.mix_data, "train", tokenizer, config.bos, config.seq_len).ids
    wanted = round(len(blocks) * config.mix_ratio / (1 - config.mix_ratio))
    if wanted > len(mixed):  # the smaller corpus limits the size; no block is repeated
        wanted = len(mixed)
        blocks = blocks[: round(wanted * (1 - config.mix_ratio) / config.mix_ratio)]
    return torch.cat([blocks, mixed[:wanted]])


def describe(result: StageRecord, progress: Progress, mask: Mask) -> None:
    """Add a run's measurements to its record."""
    result.measured |= {
        "sparsity": mask.realised_sparsity(),
        "steps": len(progress.steps),
        "batch_size": progress.batch_size,
        "loss_final": progress.steps[-1]["loss"],
        "tokens_per_second": round(progress.tokens_per_second(), 2),
    }
    result.details |= {"steps": progress.steps, "epochs": progress.epochs}


def check_student(config: DistillConfig, mask: Mask) -> None:
    """Check the invariant of the student that is given, with one block in memory.

    Raises:
        SparsityError: it does not hold.
    """
    walk = Walk("student_model", config.student_model, torch.float32, torch.device("cpu"), config.trust_remote_code)
    checks = []
    for number in range(walk.parts):
        with walk.part(number) as tensors:
            if names := tensors.keys() & mask.tensors.keys():
                checks.append(integrity(tensors, mask.only(sorted(names)), config.sparse_check_eps))
    enforce(combined(checks, mask.realised_sparsity()))


def start_dense(config: DistillConfig, backend: SingleProcess, teacher_folder: Path) -> None:
    """Set the student's trained weights to the teacher's, with one block in memory; every process must call this."""
    walk = Walk("teacher_model", teacher_folder, torch.float32, torch.device("cpu"), config.trust_remote_code)
    for number in range(walk.parts):
        with walk.part(number) as tensors:
            backend.start_from({name: tensor for name, tensor in tensors.items() if name in backend.parameters})


def check_models(config: DistillConfig, mask: Mask, teacher_folder: str) -> Any:
    """Check the models, mask, sequence lengths and free disk space before weights are read; returns the student's config.

    Raises:
        ValueError: one of them does not fit.
    """
    student, empty = inspect_checkpoint("student_model", config.student_model, config.trust_remote_code)
    teacher, dense = inspect_checkpoint("teacher_model", teacher_folder, config.trust_remote_code)
    check_dense("student_model", config.student_model, student)
    check_mask(mask, empty)
    if config.backend == "fsdp" and not config.caches_teacher() and is_quantized(Path(teacher_folder), teacher):
        raise ValueError(f"teacher_model must not be quantized for backend fsdp without teacher_cache, got {teacher_folder}")
    words = [model.get_text_config().vocab_size for model in (student, teacher)]
    if words[0] != words[1]:
        raise ValueError(f"teacher_model must have the student's vocabulary of {words[0]} words, got {words[1]}")
    texts = [model.get_text_config() for model in (student, teacher)]
    sizes = [f"{text.num_hidden_layers} blocks of width {text.hidden_size}" for text in texts]
    if config.alpha_hidden and sizes[0] != sizes[1]:
        raise ValueError(f"alpha_hidden must be 0 for a teacher of {sizes[1]} and a student of {sizes[0]}")
    if config.mask == "admm":
        check_same_shapes(mask, dense)
        counts_of(mask, empty)
    for model in (student, teacher):
        check_seq_len("seq_len", config.seq_len, model)
    if not config.skip_ppl_eval:
        check_seq_len("eval_seq_len", config.eval_seq_len, student)
    check_new("output_dir", config.output_dir, weight_bytes(config.student_model))
    return student


def check_same_shapes(mask: Mask, teacher: Any) -> None:
    """Raise ValueError unless a teacher, from whose weights training starts, has all that are masked, in the same shapes."""
    shapes = weight_shapes(teacher)
    for name, kept in mask.tensors.items():
        if shapes.get(name) != list(kept.shape):
            found = f"{shapes[name]}, not {list(kept.shape)}" if name in shapes else "missing"
            raise ValueError(f"teacher_model must have the student's shapes for mask admm, {name} is {found}")
