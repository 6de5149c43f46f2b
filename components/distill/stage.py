"""Load teacher, student and mask; train; check that zeros stayed zero; save."""

from dataclasses import asdict

import torch

from components.core.checkpoint import (
    check_checkpoint,
    check_dense,
    check_seq_len,
    empty_model,
    known_perplexity,
    load_model,
    load_tokenizer,
    read_history,
    save_checkpoint,
    weight_bytes,
    write_history,
)
from components.core.device import pick_device, pick_dtype
from components.core.files import check_new, new_directory
from components.core.mask import Mask, check_fits, enforce, integrity, load_mask, weight_shapes
from components.core.models import local_folder
from components.core.perplexity import perplexity
from components.core.progress import log, log_perplexity
from components.core.record import StageRecord, Stopwatch, versions
from components.core.tokens import load_blocks
from components.distill.config import DistillConfig
from components.distill.loop import Trainer


def run(config: DistillConfig) -> StageRecord:
    """Distil, and write the student with its record.

    Raises:
        ValueError: a setting does not fit the models, the mask or the text; before any heavy work.
        SparsityError: a weight outside the mask is not zero, and `fail_on_sparse_violation` is set.
    """
    watch = Stopwatch()
    device = pick_device()
    mask = load_mask(config.mask_file)
    teacher_folder = local_folder(config.teacher_model)
    check_models(config, mask, str(teacher_folder))
    tokenizer = load_tokenizer(config.student_model, config.trust_remote_code)
    training = load_blocks("train_data", config.train_data, "train", tokenizer, config.seq_len)
    evaluation = None
    if not config.skip_ppl_eval:
        evaluation = load_blocks("eval_data", config.eval_data, "eval", tokenizer, config.eval_seq_len, config.eval_blocks)

    dtype = pick_dtype(config.dtype, device)
    student = load_model(config.student_model, torch.float32, device, config.trust_remote_code)
    weights = dict(student.named_parameters())
    enforce(integrity(weights, mask, config.sparse_check_eps))
    teacher = load_model(teacher_folder, dtype, device, config.trust_remote_code)
    history = read_history(config.student_model)
    result = StageRecord("distill", asdict(config), versions=versions())
    evaluate = None
    if evaluation:
        ids, text = evaluation.ids, evaluation.fingerprint()
        evaluate = lambda: perplexity(student, ids)  # noqa: E731
        start = known_perplexity(history, text)
        result.measured["perplexity_before"] = perplexity(student, ids) if start is None else start
        result.measured["perplexity_text"] = text
        log_perplexity("finetune_start", result.measured["perplexity_before"])

    progress = Trainer(student, teacher, mask, training.ids, config, dtype, evaluate).fit()
    student.to(dtype)
    result.sparse_integrity_check = integrity(dict(student.named_parameters()), mask, config.sparse_check_eps)
    if config.fail_on_sparse_violation:
        enforce(result.sparse_integrity_check)
    if progress.epochs:
        result.measured["perplexity"] = progress.epochs[-1]["eval_ppl"]
    result.measured |= {
        "sparsity": mask.realised_sparsity(),
        "steps": len(progress.steps),
        "loss_final": progress.steps[-1]["loss"],
        "tokens_per_second": round(progress.tokens_per_second(), 2),
        **watch.read(),
    }
    result.details |= {"steps": progress.steps, "epochs": progress.epochs}
    with new_directory(config.output_dir) as scratch:
        save_checkpoint(student, tokenizer, scratch)
        write_history(scratch, history, result)
    log(f"distilled in {result.measured['seconds']:.0f} s: {config.output_dir}")
    return result


def check_models(config: DistillConfig, mask: Mask, teacher_folder: str) -> None:
    """Check models, mask, lengths and disk before weights are read. Raises ValueError."""
    student = check_checkpoint("student_model", config.student_model, config.trust_remote_code)
    teacher = check_checkpoint("teacher_model", teacher_folder, config.trust_remote_code)
    check_dense("student_model", config.student_model, student)
    check_fits(mask, weight_shapes(empty_model(student, config.trust_remote_code)))
    words = [model.get_text_config().vocab_size for model in (student, teacher)]
    if words[0] != words[1]:
        raise ValueError(f"teacher_model must have the student's vocabulary of {words[0]} words, got {words[1]}")
    for model in (student, teacher):
        check_seq_len("seq_len", config.seq_len, model)
    if not config.skip_ppl_eval:
        check_seq_len("eval_seq_len", config.eval_seq_len, student)
    check_new("output_dir", config.output_dir, weight_bytes(config.student_model))
