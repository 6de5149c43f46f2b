"""The prune stage: calibrate, prune and run each block in turn, then check, measure and save the model."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import check_blocks, find_blocks, linears, report_dense
from components.core.checkpoint.checks import check_dense, check_ids, check_seq_len, inspect_checkpoint
from components.core.checkpoint.files import weight_bytes
from components.core.checkpoint.loading import load_model, load_tokenizer
from components.core.checkpoint.saving import save_checkpoint
from components.core.checks import parse_pattern
from components.core.device import pick_device, pick_dtype
from components.core.files import check_new, new_directory, new_file
from components.core.history import StageRecord, Stopwatch, versions, write_history
from components.core.mask.file import MASK_FILE
from components.core.mask.integrity import enforce, integrity
from components.core.mask.mask import Mask, pruned_count, save_mask
from components.core.models import local_folder, source_history
from components.core.perplexity import perplexity
from components.core.progress import log, log_perplexity, track
from components.core.tokens import count_overlaps, load_blocks
from components.prune.calibration import Batch, advance, capture, check_replay, hessians
from components.prune.config import PruneConfig
from components.prune.magnitude import magnitude
from components.prune.sparsegpt import sparsegpt


def run(config: PruneConfig) -> StageRecord:
    """Prune a checkpoint and write the sparse checkpoint with its mask and record.

    Raises:
        ValueError: a setting does not fit the model or the text; raised before any expensive work.
        SparsityError: the result is not finite, not zero outside its mask, or does not have the requested sparsity.
    """
    watch = Stopwatch()
    config.check_environment()
    device = pick_device()
    folder = local_folder(config.dense_model, parameter="dense_model")
    model_config = check_model(config, folder)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    calibration = load_blocks(
        "calibration_data",
        config.calibration_data,
        "calibration",
        tokenizer,
        config.seq_len,
        config.nsamples,
        config.seed,
    )
    check_ids("calibration_data", calibration.ids, model_config)
    result = StageRecord("prune", asdict(config), versions=versions())
    evaluation = None
    if not config.skip_ppl_eval:
        evaluation = load_blocks("eval_data", config.eval_data, "eval", tokenizer, config.eval_seq_len, config.eval_blocks)
        check_ids("eval_data", evaluation.ids, model_config)
        overlapping = count_overlaps("calibration", calibration.ids, config.eval_data, evaluation.ids)
        result.measured["overlapping_eval_blocks"] = overlapping

    model = load_model(folder, pick_dtype(config.dtype, device), device, config.trust_remote_code)
    if evaluation:
        result.measured["perplexity_before"] = perplexity(model, evaluation.ids, "dense_model")
        log_perplexity("before_pruning", result.measured["perplexity_before"])
    mask, layers = prune_model(model, calibration.ids, config)
    result.measured |= report_dense(model, mask.tensors)
    result.sparse_integrity_check = integrity(dict(model.named_parameters()), mask)
    enforce(result.sparse_integrity_check)
    if evaluation:
        result.measured["perplexity"] = perplexity(model, evaluation.ids, "dense_model")
        result.measured["perplexity_text"] = evaluation.fingerprint()
        log_perplexity("after_pruning", result.measured["perplexity"])
    result.measured["sparsity"] = mask.realised_sparsity()
    result.measured |= watch.read()
    result.details["layers"] = layers
    # the mask outside the folder appears after the folder: if one fails, neither is left
    mask_outside = new_file(config.mask_file) if config.mask_file else contextlib.nullcontext()
    with mask_outside as mask_file, new_directory(config.output_dir) as scratch:
        save_checkpoint(model, tokenizer, scratch)
        write_history(scratch, source_history(config.dense_model, folder), result, folder)
        save_mask(mask, mask_file or scratch / MASK_FILE)
    log(f"pruned to {result.measured['sparsity']:.4f} sparsity in {result.measured['seconds']:.0f} s: {config.output_dir}")
    return result


def check_model(config: PruneConfig, folder: Path) -> Any:
    """Check the model, sequence lengths and free disk space before weights are read; returns the model's configuration.

    Raises:
        ValueError: one of them does not fit.
    """
    model_config, empty = inspect_checkpoint("dense_model", folder, config.trust_remote_code)
    check_dense("dense_model", folder, model_config)
    check_seq_len("seq_len", config.seq_len, model_config)
    if not config.skip_ppl_eval:
        check_seq_len("eval_seq_len", config.eval_seq_len, model_config)
    n_of_m = parse_pattern(config.pattern)
    name, blocks = find_blocks("dense_model", empty)
    check_blocks("dense_model", name, blocks, n_of_m[1] if n_of_m else 1)
    check_none_empty(config, name, blocks)
    check_new("output_dir", config.output_dir, weight_bytes(folder))
    return model_config


def check_none_empty(config: PruneConfig, name: str, blocks: nn.ModuleList) -> None:
    """Raise ValueError if the sparsity would remove all weights of a matrix."""
    for index, block in enumerate(blocks):
        for linear, layer in linears(block).items():
            if pruned_count(config.sparsity, layer.weight.numel()) == layer.weight.numel():
                raise ValueError(
                    f"sparsity must leave every matrix a weight, got {config.sparsity}: {name}.{index}.{linear} has "
                    f"{layer.weight.numel()}"
                )


def prune_model(model: Any, ids: Tensor, config: PruneConfig) -> tuple[Mask, list[dict[str, Any]]]:
    """Prune a model in place.

    Args:
        model: a causal language model.
        ids: calibration tokens [nsamples, seq_len].
        config: the stage's settings.

    Returns:
        (mask, one entry per linear layer: name, block, linear, sparsity, relative_error, seconds).
    """
    name, blocks = find_blocks("dense_model", model)
    batches = capture(model, blocks, ids)
    check_replay(model, blocks, batches[0], ids)
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, block in enumerate(track(blocks, "pruning blocks", len(blocks))):
        prefix = f"{name}.{index}"
        for layer_name, kept, entry in _prune_block(block, batches, index, prefix, config):
            tensors[layer_name] = kept
            layers.append(entry)
    return Mask(tensors, config.pattern, config.sparsity), layers


def _prune_block(
    block: nn.Module, batches: list[Batch], index: int, prefix: str, config: PruneConfig
) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """Prune one block's linear layers and advance the calibration activations through it."""
    pruned: list[tuple[str, Tensor, dict[str, Any]]] = []
    n_of_m = parse_pattern(config.pattern)
    hessian_of = hessians(block, batches, index, prefix)
    for linear, layer in linears(block).items():
        start = time.monotonic()
        hessian = hessian_of[linear]
        if config.method == "sparsegpt":
            weight, kept = sparsegpt(
                layer.weight,
                hessian,
                config.sparsity,
                n_of_m,
                damping=config.damping,
                block_size=config.block_size,
                what=f"{prefix}.{linear}",
            )
        else:
            weight, kept = magnitude(layer.weight, config.sparsity, n_of_m)
        error = relative_error(layer.weight, weight, hessian)
        layer.weight.data.copy_(weight)
        name = f"{prefix}.{linear}.weight"
        entry = {
            "name": name,
            "block": index,
            "linear": linear,
            "sparsity": 1 - int(kept.sum()) / kept.numel(),
            "relative_error": error,
            "seconds": round(time.monotonic() - start, 4),
        }
        pruned.append((name, kept.cpu(), entry))
    advance(block, batches, index)
    return pruned


@torch.no_grad()
def relative_error(dense: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """‖WX − ŴX‖² / ‖WX‖², computed from the Hessian XXᵀ [in, in]; weights [out, in]."""
    dense = dense.float()
    change = sparse - dense
    moved = torch.einsum("oi,oi->", change @ hessian, change)
    return float(moved / torch.einsum("oi,oi->", dense @ hessian, dense).clamp_min(torch.finfo(torch.float32).tiny))
