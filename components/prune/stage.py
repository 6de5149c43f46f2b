"""The prune stage: check, prune block by block, and write the sparse model with its mask and record."""

import contextlib
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core import processes
from components.core.blocks import check_blocks, find_blocks, is_named, layer_names, report_dense, stack_names, weights_of
from components.core.checkpoint.checks import check_dense, check_ids, check_seq_len, inspect_checkpoint
from components.core.checkpoint.files import weight_bytes, weight_files
from components.core.checkpoint.loading import load_tokenizer
from components.core.checkpoint.saving import finish_checkpoint, part_file
from components.core.checks import parse_pattern
from components.core.device import fast_dtype, pick_device, pick_dtype
from components.core.errors import shown
from components.core.files import check_new, check_room, resumable_directory, sample_fingerprint
from components.core.history import StageRecord, Stopwatch, stats_file, versions, write_history
from components.core.mask.file import MASK_FILE
from components.core.mask.integrity import combined
from components.core.mask.mask import join_mask, pruned_count
from components.core.models import local_folder, source_history
from components.core.progress import log, log_perplexity
from components.core.settings import affecting, flags_of
from components.core.tokens import TokenBlocks, count_overlaps, id_fingerprint, load_blocks
from components.core.walk.walk import Walk
from components.core.walk.work import SharedWork, work_key
from components.prune.blocks import chosen, mask_part, prune_model
from components.prune.config import UNIFORM, PruneConfig
from components.prune.recipe import AUTO, recipe_of
from components.prune.trials import allocate


def run(config: PruneConfig) -> StageRecord:
    """Prune a checkpoint and write the sparse checkpoint with its mask and record.

    Raises:
        ValueError: a setting does not fit the model or the text; raised before any expensive work.
        SparsityError: the result is not finite, not zero outside its mask, or does not have the requested sparsity.
    """
    config.check_environment()
    processes.end_with_launcher()
    device = pick_device(config.gpus)
    folder = local_folder(config.dense_model, parameter="dense_model")
    model_config, config = check_model(config, folder)
    if config.nproc_per_node > 1 and not processes.started_already():
        flags = flags_of(config, PruneConfig)
        # on a port that is free, and without a look-up of this machine's name, which a pod may not have
        command = processes.torchrun(
            "components.prune", flags, config.nproc_per_node, "--standalone", "--local_addr", "127.0.0.1"
        )
        processes.start(command, config.nproc_per_node, device)
        return StageRecord.load(Path(config.output_dir) / stats_file("prune"))
    if processes.process_count() != config.nproc_per_node:
        raise ValueError(f"nproc_per_node must be the {processes.process_count()} processes here, got {config.nproc_per_node}")
    if config.nproc_per_node > 1:
        device = processes.join(device)
    try:
        return prune(config, folder, model_config, device)
    finally:
        processes.leave()


def prune(config: PruneConfig, folder: Path, model_config: Any, device: torch.device) -> StageRecord:
    """This process's part of a run; the first process writes the result.

    Args:
        config: the stage's settings.
        folder: the dense checkpoint.
        model_config: its configuration.
        device: that of this process.
    """
    watch = Stopwatch()
    result = StageRecord("prune", asdict(config), versions=versions())
    with processes.together():
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        calibration, evaluation = load_texts(config, tokenizer, model_config)
        result.measured["bos"] = calibration.bos
        if evaluation:
            overlapping = count_overlaps("calibration", calibration.ids, config.eval_data, evaluation)
            result.measured["overlapping_eval_blocks"] = overlapping
        dtype = pick_dtype(config.dtype, device, folder)
        walk = Walk("dense_model", folder, dtype, device, config.trust_remote_code)
        walk.model.set_experts_implementation("eager")  # a product for each expert, which `calibration` can observe
    ids = [calibration.ids, *([evaluation.ids] if evaluation else [])]
    with contextlib.ExitStack() as stack:
        place: Path | None = None
        with processes.together():
            if processes.is_main():
                key = work_key(depends_on(config, folder, ids, walk))
                made = resumable_directory("output_dir", config.output_dir, key, config.mask_file)
                output, place = stack.enter_context(made)
        place = processes.from_all(place)[0]
        assert place is not None
        work = SharedWork(place, "pruning")
        with processes.together():
            if processes.is_main() and not work.results:
                streams = 2 if recipe_of(config).needs_dense else 1
                texts = [calibration.ids] * streams + ([evaluation.ids] * 2 if evaluation else [])
                check_room("output_dir", config.output_dir, walk.disk(texts), ", with the hidden states on their way")
        allocation = allocate(walk, place, calibration.ids, config)
        sparsities = allocation.sparsities
        measured = prune_model(walk, work, calibration.ids, evaluation.ids if evaluation else None, sparsities, config)
        if evaluation:
            log_perplexity("before_pruning", measured["perplexity_before"])
            log_perplexity("after_pruning", measured["perplexity"])
            result.measured |= measured | {"perplexity_text": evaluation.fingerprint()}
        with processes.together():
            layers = [layer for block in work.results for layer in block["layers"]]
            shapes = {name: shape for block in work.results for name, shape in block["shapes"].items()}
            result.details |= {"layers": layers, "allocations": allocation.as_json()}
            errors = [{"block": index} | block.get("reconstruction", {}) for index, block in enumerate(work.results)]
            if trained := [each for each in errors if len(each) > 1]:
                result.details["reconstruction"] = trained
            result.measured["allocation"] = allocation.name
            result.measured |= report_dense(walk.model, shapes)
            if idle := sum("fallback" in layer for layer in layers):
                result.measured["idle_matrices"] = idle
            result.measured["sparsity"] = total_sparsity(layers)
            checks = [block["sparse_integrity_check"] for block in work.results]
            result.sparse_integrity_check = combined(checks, result.measured["sparsity"])
            if processes.is_main():
                parts = [part_file(place, number) for number in range(walk.parts)]
                finish_checkpoint(walk.model, tokenizer, parts, dtype, output)
                masks = [mask_part(place, index) for index in range(len(walk.blocks))]
                mask_file = place / Path(config.mask_file).name if config.mask_file else output / MASK_FILE
                asked = config.sparsity if allocation.name == UNIFORM else sparsities
                join_mask(masks, mask_file, config.pattern, asked, shapes)
                result.measured |= watch.read()
                write_history(output, source_history(config.dense_model, folder), result, folder)
    log(f"pruned to {result.measured['sparsity']:.4f} sparsity in {watch.read()['seconds']:.0f} s: {config.output_dir}")
    return result


def load_texts(config: PruneConfig, tokenizer: Any, model_config: Any) -> tuple[TokenBlocks, TokenBlocks | None]:
    """Load the blocks of calibration text and, unless perplexity is not measured, those of evaluation text.

    Raises:
        ValueError: a text does not fit the settings or the model.
    """
    data, bos, length = config.calibration_data, config.bos, config.seq_len
    calibration = load_blocks("calibration_data", data, "calibration", tokenizer, bos, length, config.nsamples, config.seed)
    check_ids("calibration_data", calibration.ids, model_config)
    if config.skip_ppl_eval:
        return calibration, None
    evaluation = load_blocks(
        "eval_data", config.eval_data, "eval", tokenizer, config.bos, config.eval_seq_len, config.eval_blocks
    )
    check_ids("eval_data", evaluation.ids, model_config)
    return calibration, evaluation


def depends_on(config: PruneConfig, folder: Path, ids: list[Tensor], walk: Walk) -> dict[str, Any]:
    """All that the pruned model depends on: work that a killed process left is used again only if none of it has changed."""
    used, formats = versions(), [str(each) for each in (walk.dtype, fast_dtype(config.dtype, walk.device))]
    return {
        "settings": affecting(config),
        "model": sample_fingerprint([folder / "config.json", *weight_files(folder)]),
        "text": [id_fingerprint(rows) for rows in ids],
        "computed": [*formats, str(walk.device), torch.get_num_threads(), used["torch"], used["transformers"]],
    }


def total_sparsity(layers: list[dict[str, Any]]) -> float:
    """Share of zeros over all matrices; takes their shapes out of their entries."""
    sizes: list[int] = [math.prod(layer.pop("shape")) for layer in layers]
    zeros: int = sum(round(layer["sparsity"] * size) for layer, size in zip(layers, sizes, strict=True))
    return zeros / sum(sizes)


def check_model(config: PruneConfig, folder: Path) -> tuple[Any, PruneConfig]:
    """Check the model, sequence lengths and free disk space before weights are read.

    Returns:
        the model's configuration, and the stage's settings as they suit it.

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
    check_blocks("dense_model", name, blocks, n_of_m[1] if n_of_m else 1, config.ignored())
    check_ignore(config, name, blocks)
    if any(map(stack_names, blocks)):
        config = suiting_experts(config, name)
    check_none_empty(config, name, blocks)
    check_new("output_dir", config.output_dir, weight_bytes(folder))
    return model_config, config


def check_ignore(config: PruneConfig, name: str, blocks: nn.ModuleList) -> None:
    """Raise ValueError if a pattern of `ignore` names no layer of the blocks, or the patterns together name all of them."""
    layers = [f"{name}.{index}.{inner}" for index, block in enumerate(blocks) for inner in layer_names(block)]
    for pattern in config.ignored():
        if not any(is_named(layer, [pattern]) for layer in layers):
            raise ValueError(f"ignore must name layers of {name}, such as {layers[0]}, got {shown(pattern)}")
    if not any(chosen(block, f"{name}.{index}", config) for index, block in enumerate(blocks)):
        raise ValueError(f"ignore must leave something to prune, got {shown(config.ignore)}")


def suiting_experts(config: PruneConfig, name: str) -> PruneConfig:
    """The settings for a model that routes its tokens to experts; what its preset says otherwise is told.

    A token may be routed to another expert after pruning, which has no output for it in the dense model. Experts that are
    stored together have equal sparsities.

    Raises:
        ValueError: other settings are given.
    """
    for parameter, suiting in {"target": (AUTO, "pruned"), "allocation": (UNIFORM,)}.items():
        if (given := getattr(config, parameter)) not in suiting:
            raise ValueError(f"{parameter} must be {suiting[-1]} for a model with experts, got {given}: {name} has some")
    if (found := recipe_of(config).target) != "pruned":
        log(f"target is pruned, not {found} as in effort {config.effort}: {name} has experts")
    return replace(config, target="pruned")


def check_none_empty(config: PruneConfig, name: str, blocks: nn.ModuleList) -> None:
    """Raise ValueError if the sparsity would remove all weights of a matrix."""
    for index, block in enumerate(blocks):
        prefix, weights = f"{name}.{index}", weights_of(block)
        for inner in chosen(block, prefix, config):
            size = weights[inner].numel()
            if pruned_count(config.sparsity, size) == size:
                raise ValueError(
                    f"sparsity must leave every matrix a weight, got {config.sparsity}: {prefix}.{inner} has {size}"
                )
