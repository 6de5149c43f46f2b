"""Quantize a model part by part, then check and measure what was written, as any user would load it."""

import copy
import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from components.core.blocks import check_blocks, check_quantizable, find_blocks, matrices, report_dense, routing, stack_names
from components.core.checkpoint.checks import check_dense, check_ids, check_seq_len, inspect_checkpoint
from components.core.checkpoint.files import weight_bytes, weight_files
from components.core.checkpoint.loading import load_tokenizer, open_model
from components.core.checkpoint.saving import finish_checkpoint, parameters_outside, part_file, save_tensors
from components.core.device import pick_device, pick_dtype
from components.core.errors import readable
from components.core.files import check_new, resumable_directory, sample_fingerprint
from components.core.history import StageRecord, Stopwatch, read_history, versions, write_history
from components.core.mask.integrity import combined, enforce, integrity
from components.core.mask.mask import Mask, load_mask
from components.core.mask.prunable import check_mask, head_name, prunable_weights
from components.core.progress import log, log_perplexity, track
from components.core.settings import affecting
from components.core.tokens import id_fingerprint, load_blocks
from components.core.walk.measure import measure
from components.core.walk.walk import Walk
from components.core.walk.work import Work, work_key
from components.quantize.config import QuantizeConfig

CPU = torch.device("cpu")


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
    evaluation = None
    if not config.skip_ppl_eval:
        check_seq_len("eval_seq_len", config.eval_seq_len, model_config)
        evaluation = load_blocks(
            "eval_data", config.eval_data, "eval", tokenizer, config.bos, config.eval_seq_len, config.eval_blocks
        )
        check_ids("eval_data", evaluation.ids, model_config)

    dtype, trust = pick_dtype(config.dtype, device, config.model_dir), config.trust_remote_code
    # on the CPU: on a GPU, optimum-quanto repacks float8 weights for its own kernels, so their zeros cannot be checked
    walk = Walk("model_dir", config.model_dir, dtype, CPU, trust)
    check_stored_experts(walk)
    log(f"quantizing to {config.format} with {engine.NAME}")
    result = StageRecord("quantize", asdict(config), versions=versions())
    result.measured |= report_dense(walk.model, prunable_weights(walk.model))
    key = work_key(depends_on(config, mask, evaluation.ids if evaluation else None, walk, engine))
    with resumable_directory("output_dir", config.output_dir, key) as (output, place):
        work = Work(place / "quantized", "quantizing")
        quantize_model(walk, work, engine, config.format, mask)
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
        result.measured |= {"sparsity": sparsity, "engine": engine.NAME, **watch.read()}
        write_history(output, read_history(config.model_dir), result, config.model_dir)
    log(f"quantized to {config.format}, {result.measured['bytes'] / 1e6:.0f} MB: {config.output_dir}")
    return result


def depends_on(
    config: QuantizeConfig, mask: Mask | None, evaluation: Tensor | None, walk: Walk, engine: ModuleType
) -> dict[str, Any]:
    """All that the quantized model depends on: work that a killed process left is used again only if none of it has changed."""
    folder = Path(config.model_dir)
    return {
        "settings": affecting(config),
        "model": sample_fingerprint([folder / "config.json", *weight_files(folder)]),
        "mask": mask.fingerprint() if mask else "",
        "text": "" if evaluation is None else id_fingerprint(evaluation),
        "computed": [str(walk.dtype), engine.NAME, torch.get_num_threads(), versions()],
    }


def quantize_model(walk: Walk, work: Work, engine: ModuleType, format: str, mask: Mask | None) -> None:
    """Quantize a model and write it, part by part, to the work's folder; goes on after the parts that are finished.

    Args:
        walk: the model.
        work: has, for each finished part, `weights` and `zeros` (their numbers under the mask) and `sparse_integrity_check`.
            The first part is what lies outside the blocks, then comes a part for each block.
        engine: a module such as `with_quanto`.
        format: `int8` or `fp8`.
        mask: which weights must be zero; None = those that are zero before.

    Raises:
        SparsityError: one of them is not.
    """
    layers = [(index, matrix.layer) for index, block in enumerate(walk.blocks) for matrix in matrices(block).values()]
    inside = [f"{walk.name}.{index}.{layer}" for index, layer in layers]
    numbers = range(len(work.results), walk.parts)
    for number in track(numbers, "quantizing", len(numbers)):
        # the engine changes a copy, made while it takes no memory, so that the walk's own model stays as it is
        copied = copy.deepcopy(walk.blocks[number - 1] if number else walk.model)
        prefix = f"{walk.name}.{number - 1}." if number else ""
        with walk.part(number) as dense:
            own = {name.removeprefix(prefix): tensor for name, tensor in dense.items()}
            copied.load_state_dict(own, strict=False, assign=True)
            engine.quantize(copied, format, [] if number else [head_name(walk.model), *inside])
            stored = copied.state_dict() if number else parameters_outside(copied, find_blocks("model_dir", copied)[1])
            made = {f"{prefix}{name}": tensor for name, tensor in stored.items()}
            result = write_part(walk, work, engine, dense, made, mask)
        work.commit(result, [part_file(work.folder, number)])


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
def write_part(
    walk: Walk, work: Work, engine: ModuleType, dense: dict[str, Tensor], made: dict[str, Tensor], mask: Mask | None
) -> dict[str, Any]:
    """Check and write a quantized part of a model; returns its result, see `quantize_model`.

    Args:
        walk: see `quantize_model`.
        work: see `quantize_model`.
        engine: see `quantize_model`.
        dense: the part's tensors before, by name.
        made: those that are stored.
        mask: see `quantize_model`.
    """
    names = [name for name in prunable_weights(walk.model) if name in dense and (mask is None or name in mask.tensors)]
    kept = {name: dense[name].cpu() != 0 if mask is None else mask.tensors[name] for name in names}
    check = integrity({name: engine.stored(made, name) for name in names}, Mask(kept, sparsity=mask.sparsity if mask else None))
    enforce(check)
    save_tensors(engine.named(walk.weights, made), part_file(work.folder, len(work.results)))
    weights = sum(tensor.numel() for tensor in kept.values())
    return {
        "weights": weights,
        "zeros": weights - sum(int(tensor.sum()) for tensor in kept.values()),
        "sparse_integrity_check": check,
    }


def pick_engine(format: str, has: str = "") -> ModuleType:
    """optimum-quanto if it is installed and can be used, otherwise compressed-tensors, which supports int8 only.

    Args:
        format: `int8` or `fp8`.
        has: what the model has that optimum-quanto cannot load: `experts` or `code of its own`.

    Raises:
        ValueError: the format is fp8, and optimum-quanto cannot be used.
    """
    if has and format != "int8":
        raise ValueError(f"format must be int8 for a model with {has}, got {format}: optimum-quanto would not load it")
    if not has and importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        from components.quantize import with_quanto

        return with_quanto
    if format != "int8":
        raise ValueError(f"format must be int8 where optimum-quanto is not installed, got {format}: pip install optimum-quanto")
    from components.quantize import with_compressed_tensors

    return with_compressed_tensors
