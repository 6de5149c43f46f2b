"""Load a dense, sparse or quantized checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from components.core.checkpoint.checks import check_checkpoint
from components.core.checkpoint.files import QUANTO_FILE
from components.core.progress import quiet_bars

transformers_logging.disable_progress_bar()  # a pod's log should not contain control characters


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a dense, sparse or quantized checkpoint in evaluation mode.

    Raises:
        ValueError: the folder is not a checkpoint, or its weights do not match its configuration.
    """
    config = check_checkpoint("model folder", path, trust_remote_code)
    try:
        if (Path(path) / QUANTO_FILE).is_file():
            from optimum.quanto import QuantizedModelForCausalLM

            model = QuantizedModelForCausalLM.from_pretrained(path)._wrapped
            if device.type == "cuda":
                dequantize(model)
        else:
            more: dict[str, Any] = {"dtype": dtype}
            if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "compressed-tensors":
                # decompress now, not in the first forward pass of the whole model: we call its decoder directly
                more = {"dtype": "auto", "quantization_config": CompressedTensorsConfig(run_compressed=False)}
            with quiet_bars():
                model, report = AutoModelForCausalLM.from_pretrained(
                    path,
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                    **more,
                )
            for name, found, expected in sorted(report["mismatched_keys"]):
                raise ValueError(f"{path} must hold weights of its model's shapes, {name} is {[*found]}, not {[*expected]}")
            for name in sorted(report["missing_keys"]):
                raise ValueError(f"{path} must hold every weight of its model, {name} is missing")
    except SafetensorError as error:
        raise ValueError(f"{path} holds weights that cannot be read: {error}") from error
    return model.to(device).eval()


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some classes build if the files are missing
            raise ValueError("it has special tokens alone")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold a tokenizer that transformers can read: {error}") from error
    return tokenizer


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build a model from its configuration without allocating its weights, to inspect names and shapes."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model
