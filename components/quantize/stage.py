"""Quantize a model part by part, then check and measure what was written, as any user would load it."""

import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from components.core.blocks import check_blocks, check_quantizable, find_blocks, report_dense
from components.core.checkpoint.checks import check_dense, check_ids, check_seq_len, inspect_checkpoint
from components.core.checkpoint.files import weight_bytes, weight_files
from components.core.checkpoint.loading import load_tokenizer, open_model
from components.core.checkpoint.saving import finish_checkpoint, part_file
from components.core.device import pick_device, pick_dtype
from components.core.errors import readable
from components.core.files import check_new, resumable_directory, sample_fingerprint
from components.core.history import StageRecord, Stopwatch, read_history, versions, write_history
from components.core.mask.integrity import combined
from components.core.mask.mask import Mask, load_mask
from components.core.mask.prunable import check_mask, prunable_weights
from components.core.progress import log, log_perplexity
from components.core.settings import affecting
from components.core.tokens import count_overlaps, id_fingerprint, load_blocks
from components.core.walk.measure import measure
from components.core.walk.walk import Walk
from components.core.walk.work import Work, work_key
from components.quantize.blocks import check_stored_experts, not_quantized, quantize_model
from components.quantize.config import PACKED, QuantizeConfig

CPU = torch.device("cpu")
LOADERS = {"fp8": "optimum-quanto"} | dict.fromkeys(PACKED, "the packed formats' loader")


def run(config: QuantizeConfig) -> StageRecord:
    """Quantize a checkpoint.

    Raises:
        ValueError: a setting does not fit the model or the text; raised before any expensive work.
        SparsityError: a weight outside the mask is not zero in the quantized data.
    """
    watch = Stopwatch()
    config.check_environment()
    device = pick_device(config.gpus)
    model_config, empty = inspect_checkpoint("model_dir", config.model_dir, config.trust_remote_code)
    check_dense("model_dir", config.model_dir, model_config)
    name, blocks = find_blocks("model_dir", empty)
    has_experts = check_quantizable("model_dir", name, blocks)
    check_blocks("model_dir", name, blocks)
    mask = load_mask(config.mask_file) if config.mask_file else None
    if mask:
        check_mask(mask, empty)
    check_new("output_dir", config.output_dir, weight_bytes(config.model_dir))
    has_code = bool(empty.is_remote_code())  # type: ignore[operator]
    engine = pick_engine(config.format, "experts" if has_experts else "code of its own" if has_code else "")
    tokenizer = load_tokenizer(config.model_dir, config.trust_remote_code)
    evaluation = calibration = None
    result = StageRecord("quantize", asdict(config), versions=versions())
    if config.by_gptq():
        check_seq_len("seq_len", config.seq_len, model_config)
        data, length, count = config.calibration_data, config.seq_len, config.nsamples
        calibration = load_blocks("calibration_data", data, "calibration", tokenizer, config.bos, length, count, config.seed)
        check_ids("calibration_data", calibration.ids, model_config)
    if not config.skip_ppl_eval:
        check_seq_len("eval_seq_len", config.eval_seq_len, model_config)
        evaluation = load_blocks(
            "eval_data", config.eval_data, "eval", tokenizer, config.bos, config.eval_seq_len, config.eval_blocks
        )
        check_ids("eval_data", evaluation.ids, model_config)
    if calibration and evaluation:
        overlapping = count_overlaps("calibration", calibration.ids, config.eval_data, evaluation)
        result.measured["overlapping_eval_blocks"] = overlapping

    dtype, trust = pick_dtype(config.dtype, device, config.model_dir), config.trust_remote_code
    # on a GPU, optimum-quanto would repack float8 weights for its own kernels, so that their zeros could not be checked
    walk = Walk("model_dir", config.model_dir, dtype, device if config.format in PACKED else CPU, trust)
    check_stored_experts(walk)
    how = "gptq" if calibration else "nearest"
    log(f"quantizing to {config.format} with {engine.NAME}, rounding: {how}")
    result.measured |= report_dense(walk.model, prunable_weights(walk.model))
    texts = [text.ids if text else None for text in (calibration, evaluation)]
    key = work_key(depends_on(config, mask, texts, walk, engine))
    with resumable_directory("output_dir", config.output_dir, key) as (output, place):
        work = Work(place / "quantized", "quantizing")
        quantize_model(walk, work, engine, config, mask, texts[0])
        parts = [part_file(work.folder, number) for number in range(walk.parts)]
        finish_checkpoint(walk.model, tokenizer, parts, dtype, output)
        engine.finish(walk.model, config.format, not_quantized(walk), output)
        with readable(f"model_dir {config.model_dir} must be a model that loads again when it is quantized"):
            open_model(output, dtype, CPU, trust)
        sparsity = sum(part["zeros"] for part in work.results) / sum(part["weights"] for part in work.results)
        result.sparse_integrity_check = combined([part["sparse_integrity_check"] for part in work.results], sparsity)
        if evaluation:
            ppl = measure("model_dir", output, evaluation.ids, dtype, device, place / "measured", trust)
            result.measured |= {"perplexity": ppl, "perplexity_text": evaluation.fingerprint(), "bos": evaluation.bos}
            log_perplexity("after_quantization", ppl)
        result.measured |= {"sparsity": sparsity, "engine": engine.NAME, "rounding": how, **watch.read()}
        write_history(output, read_history(config.model_dir), result, config.model_dir)
    log(f"quantized to {config.format}, {result.measured['bytes'] / 1e6:.0f} MB: {config.output_dir}")
    return result


def depends_on(
    config: QuantizeConfig, mask: Mask | None, texts: list[Tensor | None], walk: Walk, engine: ModuleType
) -> dict[str, Any]:
    """All that the quantized model depends on: work that a killed process left is used again only if none of it has changed."""
    folder = Path(config.model_dir)
    return {
        "settings": affecting(config),
        "model": sample_fingerprint([folder / "config.json", *weight_files(folder)]),
        "mask": mask.fingerprint() if mask else "",
        "text": ["" if ids is None else id_fingerprint(ids) for ids in texts],
        "computed": [str(walk.dtype), str(walk.device), engine.NAME, torch.get_num_threads(), versions()],
    }


def pick_engine(format: str, has: str = "") -> ModuleType:
    """The engine of a format; of int8, optimum-quanto if it is installed and can be used, otherwise compressed-tensors.

    Args:
        format: see `QuantizeConfig`.
        has: what the model has that optimum-quanto cannot load: `experts` or `code of its own`.

    Raises:
        ValueError: the engine cannot be used, or not for such a model.
    """
    if format in PACKED and has != "experts":
        from components.quantize import with_packed

        return with_packed
    if has and format != "int8":
        raise ValueError(f"format must be int8 for a model with {has}, got {format}: {LOADERS[format]} would not load it")
    if not has and importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        from components.quantize import with_quanto

        return with_quanto
    if format != "int8":
        raise ValueError(f"format must be int8 where optimum-quanto is not installed, got {format}: pip install optimum-quanto")
    from components.quantize import with_compressed_tensors

    return with_compressed_tensors
