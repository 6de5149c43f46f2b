"""The model zoo: every causal family of the installed transformers that can be built tiny goes through the stages.

Each family is evaluated, pruned, and quantized. A stage either measures what transformers alone measures on the same folder,
and leaves no matrix as it was without saying so, or refuses the family in one line.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from optimum.quanto import QLinear, QuantizedModelForCausalLM
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from tests.conftest import tiny_tokenizer
from tests.hostile.families import families, tiny
from tests.hostile.harness import Case, Ended, Kind, refusal, resources, stage
from tests.hostile.lab import EVALUATION, Lab

FEWEST = 90  # families that must be built
LARGEST = 8_000_000  # weights of a tiny model
# families that the README names, and others like them: these must not be refused
SUPPORTED = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi", "phi3", "olmo2", "smollm3", "opt", "stablelm",
    "starcoder2", "falcon", "glm4", "gpt_neox", "gemma2", "granite", "cohere", "cohere2",
}  # fmt: skip
DENSE_ONLY = {"mixtral", "qwen3_moe", "mamba", "gpt2"}  # these must at least be evaluated
# format → how much it may change a weight, relative to the largest of its row, and the mean loss, relative to it
NEAR = {"int8": (0.5 / 127, 0.05), "fp8": (0.5 / 8, 0.2)}
SPARSE = 0.7
DEQUANTIZE = CompressedTensorsConfig(dequantize=True)


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """A case for each family, and one more for each that is an encoder unless it is told to be a decoder."""
    configs, built = {}, 0
    for family in families():
        try:
            configs[family] = tiny(family)
            if getattr(configs[family], "is_decoder", True) is False:
                configs[f"{family} as a decoder"] = tiny(family, is_decoder=True)
            with torch.device("meta"):
                size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(configs[family]).parameters())
            assert size < LARGEST, f"{size} weights"
            built += 1
        except Exception as error:  # every one that a library can raise
            what = "must be refused" if configs.get(family) else "is left out"
            print(f"models: {family} cannot be built and {what}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    assert built >= FEWEST, f"only {built} families were built"
    names = sorted(configs) if count >= len(configs) else random.sample(sorted(configs), count)
    for name in names:
        yield Case(name, partial(_check, lab, name, configs[name]))


def _check(lab: Lab, family: str, config: Any, place: Path) -> str | None:
    """Take one family through the stages; returns what went wrong."""
    _save(config, place / "dense", lab)
    expected = _plain("dense", lab)
    text = {"eval_data": lab.path("corpus")}
    evaluated = stage("evaluate", lab.settings("evaluate", model_dir="dense", **text), place)
    if fault := _measures(evaluated, "perplexity", expected, family in SUPPORTED | DENSE_ONLY):
        return f"evaluate: {fault}"
    settings = lab.settings("prune", output_dir="pruned", dense_model="dense", calibration_data=lab.path("corpus"), **text)
    pruned = stage("prune", settings, place)
    fault = _measures(pruned, "perplexity_before", expected, family in SUPPORTED)
    if not fault and pruned.code == 0:
        expected = _plain("pruned", lab)
        fault = _measures(pruned, "perplexity", expected, True) or _left_dense(pruned)
    if fault:
        return f"prune: {fault}"
    source = {"model_dir": "pruned", "mask_file": "pruned"} if pruned.code == 0 else {"model_dir": "dense", "mask_file": ""}
    for format in NEAR:
        ended = stage("quantize", lab.settings("quantize", output_dir=format, format=format, **source, **text), place)
        fault = (
            _refused(ended, family in SUPPORTED)
            if ended.code
            else _quantized(format, source["model_dir"], ended, expected, lab)
        )
        if not fault and ended.code == 0:
            again = stage("evaluate", lab.settings("evaluate", model_dir=format, **text), place)
            fault = _measures(again, "perplexity", float(measured(ended)["perplexity"]), True)
        if fault:
            return f"{format}: {fault}"
    return None


def _save(config: Any, folder: Path, lab: Lab) -> None:
    """Save a random model, whose weights are larger than usual: predictions that differ from uniform make faults visible."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception:  # no stage can build it either
        config.save_pretrained(folder)
        lab.copy("dense/model.safetensors", folder)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:  # some are zero at first
                    parameter.copy_(parameter * 5 if parameter.any() else torch.randn_like(parameter) / 10)
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _plain(folder: str, lab: Lab) -> float | None:
    """The perplexity by transformers alone; None if it cannot load or run the model."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return perplexity(model, folder, lab)
    except Exception:
        return None


@torch.no_grad()
def perplexity(model: nn.Module, folder: str, lab: Lab) -> float:
    """The perplexity of the evaluation text as the model itself computes its logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(Path(lab.path("corpus/test.txt")).read_text(encoding="utf-8"))["input_ids"])
    count, seq_len = EVALUATION["eval_blocks"], EVALUATION["eval_seq_len"]
    blocks = ids[: count * seq_len].view(count, seq_len)
    logits = model.eval()(input_ids=blocks, use_cache=False).logits.double()
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()).exp())


def measured(ended: Ended) -> dict[str, str]:
    """What a stage's last line says that it measured."""
    return dict(re.findall(r"(\w+)=(\S+)", ended.out.splitlines()[-1]))


def _measures(ended: Ended, name: str, expected: float | None, required: bool) -> str | None:
    """Whether a stage measured what was expected, or refused the family in one line, unless it is required to work."""
    if ended.code:
        return _refused(ended, required)
    found = float(measured(ended)[name])
    if expected is None or abs(found / expected - 1) > 1e-4:
        return f"{name} must be {expected}, got {found}"
    return resources(ended)


def _refused(ended: Ended, required: bool) -> str | None:
    if required:
        return f"refused: {ended.err[-300:]!r}"
    return refusal(ended, "model_dir", "dense_model", "nsamples", "dtype", "format")


def _left_dense(ended: Ended) -> str | None:
    """Whether pruning left matrices dense without a word."""
    model = AutoModelForCausalLM.from_pretrained("pruned", dtype=torch.float32)
    ends = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    ends.add(id(model.get_output_embeddings().weight))
    left = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and id(weight) not in ends and float((weight == 0).float().mean()) < SPARSE - 0.05
    }
    told = int(measured(ended).get("dense_weights", 0))
    return f"{sum(left.values())} weights stay dense, told are {told}: {left}"[:400] if sum(left.values()) != told else None


def _quantized(format: str, source: str, ended: Ended, expected: float | None, lab: Lab) -> str | None:
    """Whether a quantized model is what it is said to be: each of its layers, and its perplexity."""
    if expected is None:
        return "it was quantized, but transformers alone cannot run it"
    found = float(measured(ended)["perplexity"])
    weight_change, loss_change = NEAR[format]
    if not abs(math.log(found) / math.log(expected) - 1) < loss_change:
        return f"perplexity must be near {expected}, got {found}"
    by_quanto = measured(ended)["engine"] == "optimum-quanto"
    model = _by_quanto(format) if by_quanto else AutoModelForCausalLM.from_pretrained(format, quantization_config=DEQUANTIZE)
    if abs(perplexity(model, format, lab) / found - 1) > 1e-4:
        return f"perplexity must be {perplexity(model, format, lab)}, got {found}"
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    head = plain.get_output_embeddings()
    for name, layer in plain.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        other = model.get_submodule(name)
        if by_quanto and not isinstance(other, QLinear):
            return f"not quantized, without a word: {name}"
        weight = other.weight.dequantize() if by_quanto else other.weight
        largest = layer.weight.abs().amax(1, keepdim=True)  # [out, 1]
        if bool(((weight - layer.weight).abs() > largest * weight_change + 1e-6).any()):
            return f"{name} must be near what was quantized"
    return None


def _by_quanto(folder: str) -> nn.Module:
    """A model that optimum-quanto quantized."""
    model: nn.Module = QuantizedModelForCausalLM.from_pretrained(folder)._wrapped
    return model


KIND = Kind(cases, whole=1000, short=6)
