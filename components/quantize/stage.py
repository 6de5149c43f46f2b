"""Quantize, save, reload as any user would, then check and measure the reloaded model."""

import importlib.util
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch

from components.core.blocks import check_blocks, find_blocks, report_dense
from components.core.checkpoint.checks import check_dense, check_ids, check_seq_len, inspect_checkpoint
from components.core.checkpoint.files import weight_bytes
from components.core.checkpoint.loading import load_model, load_tokenizer
from components.core.checkpoint.saving import save_checkpoint
from components.core.device import pick_device, pick_dtype
from components.core.errors import readable
from components.core.files import check_new, new_directory
from components.core.history import StageRecord, Stopwatch, read_history, versions, write_history
from components.core.mask.integrity import enforce, integrity
from components.core.mask.mask import Mask, load_mask
from components.core.mask.prunable import check_mask, head_name, prunable_weights
from components.core.perplexity import perplexity
from components.core.progress import log, log_perplexity
from components.core.tokens import load_blocks
from components.quantize.config import QuantizeConfig


def run(config: QuantizeConfig) -> StageRecord:
    """Quantize a checkpoint.

    Raises:
        ValueError: a setting does not fit the model or the text; raised before any expensive work.
        SparsityError: a weight outside the mask is not zero in the quantized data.
    """
    watch = Stopwatch()
    config.check_environment()
    device = pick_device()
    model_config, empty = inspect_checkpoint("model_dir", config.model_dir, config.trust_remote_code)
    check_dense("model_dir", config.model_dir, model_config)
    check_blocks("model_dir", *find_blocks("model_dir", empty))
    mask = load_mask(config.mask_file) if config.mask_file else None
    if mask:
        check_mask(mask, empty)
    check_new("output_dir", config.output_dir, weight_bytes(config.model_dir))
    engine = pick_engine(config.format)
    tokenizer = load_tokenizer(config.model_dir, config.trust_remote_code)
    evaluation = None
    if not config.skip_ppl_eval:
        check_seq_len("eval_seq_len", config.eval_seq_len, model_config)
        evaluation = load_blocks("eval_data", config.eval_data, "eval", tokenizer, config.eval_seq_len, config.eval_blocks)
        check_ids("eval_data", evaluation.ids, model_config)

    dtype, cpu = pick_dtype(config.dtype, device), torch.device("cpu")
    # on the CPU: on a GPU, optimum-quanto repacks float8 weights for its own kernels, so their zeros cannot be checked
    model = load_model(config.model_dir, dtype, cpu, config.trust_remote_code)
    mask = mask or zeros(model)
    log(f"quantizing to {config.format} with {engine.NAME}")
    result = StageRecord("quantize", asdict(config), versions=versions())
    result.measured |= report_dense(model, prunable_weights(model))
    with new_directory(config.output_dir) as scratch:
        save_checkpoint(engine.quantize(model, config.format, head_name(model)), tokenizer, scratch)
        del model
        with readable(f"model_dir {config.model_dir} must be a model that loads again when it is quantized"):
            quantized = load_model(scratch, dtype, cpu, config.trust_remote_code)
        data = {name: engine.stored(quantized.get_submodule(name.removesuffix(".weight"))) for name in mask.tensors}
        result.sparse_integrity_check = integrity(data, mask)
        enforce(result.sparse_integrity_check)
        if evaluation:
            if device != cpu:
                quantized = load_model(scratch, dtype, device, config.trust_remote_code)
            result.measured["perplexity"] = perplexity(quantized, evaluation.ids, "model_dir")
            result.measured["perplexity_text"] = evaluation.fingerprint()
            log_perplexity("after_quantization", result.measured["perplexity"])
        result.measured |= {"sparsity": mask.realised_sparsity(), "engine": engine.NAME, **watch.read()}
        write_history(scratch, read_history(config.model_dir), result, config.model_dir)
    log(f"quantized to {config.format}, {result.measured['bytes'] / 1e6:.0f} MB: {config.output_dir}")
    return result


def pick_engine(format: str) -> ModuleType:
    """optimum-quanto if it is installed, otherwise compressed-tensors, which supports int8 only.

    Raises:
        ValueError: the format is fp8 and optimum-quanto is not installed.
    """
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        from components.quantize import with_quanto

        return with_quanto
    if format != "int8":
        raise ValueError(f"format must be int8 where optimum-quanto is not installed, got {format}: pip install optimum-quanto")
    from components.quantize import with_compressed_tensors

    return with_compressed_tensors


@torch.no_grad()
def zeros(model: Any) -> Mask:
    """Mask of the weights that are currently zero in the layers to be quantized."""
    return Mask({name: (weight != 0).cpu() for name, weight in prunable_weights(model).items()})
