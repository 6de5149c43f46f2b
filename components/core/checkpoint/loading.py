"""Load a dense, sparse or quantized checkpoint."""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from components.core.checkpoint.checks import inspect_checkpoint
from components.core.checkpoint.files import QUANTO_FILE, stored_shapes
from components.core.errors import readable
from components.core.progress import quiet_bars

transformers_logging.disable_progress_bar()  # a pod's log should not contain control characters
transformers_logging.set_verbosity_error()  # what its warnings are about is checked, and an error is one line


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a dense, sparse or quantized checkpoint in evaluation mode.

    Raises:
        ValueError: the folder is not a checkpoint, or its weights do not match its configuration.
    """
    config, empty = inspect_checkpoint("model folder", path, trust_remote_code)
    if (Path(path) / QUANTO_FILE).is_file():
        model = _load_quanto(Path(path), empty)
        if device.type == "cuda":
            dequantize(model)
    else:
        more: dict[str, Any] = {"dtype": dtype}
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "compressed-tensors":
            # decompress now, not in the first forward pass of the whole model: we call its decoder directly
            more = {"dtype": "auto", "quantization_config": CompressedTensorsConfig(dequantize=True)}
            # a scale without its weight would end in an error of the conversion that names neither
            stored = {name.removesuffix("_packed") for name in stored_shapes(Path(path))}
            _refuse(path, {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")} - stored, ())
        with readable(f"{path} must hold weights that transformers can load"), quiet_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **more,
            )
        for name, found, expected in sorted(report["mismatched_keys"]):
            _check_shape(path, name, found, expected)
        _refuse(path, report["missing_keys"], report["unexpected_keys"])
    return model.to(device).eval()


def _load_quanto(folder: Path, empty: nn.Module) -> Any:
    """Load a model that optimum-quanto has quantized.

    Its loader leaves a weight that it does not find as raw memory, ignores one that it does not know, and takes one of any
    shape; `empty` has the right ones.
    """
    from optimum.quanto import QuantizedModelForCausalLM

    # of a damaged configuration, torch warns before it fails
    with readable(f"{folder} must hold weights that optimum-quanto can load"), warnings.catch_warnings(action="ignore"):
        model = QuantizedModelForCausalLM.from_pretrained(folder)._wrapped
    shapes = stored_shapes(folder)
    stored = shapes.keys()
    tensors = model.state_dict(keep_vars=True)
    names_of: dict[int, set[str]] = defaultdict(set)  # tied weights, which are stored once, are one tensor
    for name, tensor in tensors.items():
        names_of[id(tensor)].add(name)
    missing = [sorted(names)[0] for names in names_of.values() if not names & stored]
    _refuse(folder, missing, stored - tensors.keys())
    expected = dict(empty.named_parameters())
    for name, parameter in model.named_parameters():
        _check_shape(folder, name, parameter.shape, expected[name].shape)
        if f"{name}._data" in shapes:  # the parameter would have the shape that it should have, whatever is stored
            _check_shape(folder, f"{name}._data", shapes[f"{name}._data"], expected[name].shape)
    return model


def _refuse(path: str | Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ValueError if a checkpoint lacks weights of its model, or has others; names the first."""
    for name in sorted(missing):
        raise ValueError(f"{path} must hold every weight of its model, {name} is missing")
    for name in sorted(unexpected):
        raise ValueError(f"{path} must hold only weights of its model, {name} is not one of them")


def _check_shape(path: str | Path, name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    if [*found] != [*expected]:
        raise ValueError(f"{path} must hold weights of its model's shapes, {name} is {[*found]}, not {[*expected]}")


def dequantize(model: nn.Module) -> None:
    """Replace optimum-quanto's linear layers in place with plain ones that have the same weights.

    On recent GPUs, optimum-quanto would repack its float8 weights for kernels that it compiles with nvcc, which a runtime
    image does not have.
    """
    from optimum.quanto import QLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, QLinear):
            weight = module.weight.dequantize()
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        ValueError: the folder has no tokenizer that transformers can read.
    """
    with readable(f"{path} must hold a tokenizer that transformers can read"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes build if the files are missing
            raise ValueError("it has special tokens alone")
    return tokenizer
