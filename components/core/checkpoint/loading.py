"""Make the model of a dense, sparse or quantized checkpoint, with its weights or without."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel
from transformers.modeling_utils import get_hf_quantizer
from transformers.utils import logging as transformers_logging

from components.core.checkpoint.checks import inspect_checkpoint
from components.core.checkpoint.files import PACKED_METHOD
from components.core.checkpoint.weights import Weights
from components.core.errors import readable, shown
from components.core.packed.with_transformers import PackedConfig

transformers_logging.disable_progress_bar()  # a pod's log should not contain control characters
transformers_logging.set_verbosity_error()  # what its warnings are about is checked, and an error is one line


def open_model(
    path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Weights]:
    """Make the model of a checkpoint without its parameters.

    Args:
        path: folder with a dense, sparse or quantized checkpoint.
        dtype: number format of the parameters.
        device: where its buffers are.
        trust_remote_code: run code that comes with the model.

    Returns:
        (model in evaluation mode, its parameters on the meta device; its weights, which can be loaded into it).

    Raises:
        ValueError: the folder is not a checkpoint, or its weights do not match its configuration.
    """
    config, _ = inspect_checkpoint("model folder", path, trust_remote_code)
    config, quantizer = copy.deepcopy(config), None
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method == "compressed-tensors":
        rule = f"{path} must have a quantization_config that compressed-tensors can use"
        with readable(rule), warnings.catch_warnings(action="ignore"):  # that it is used with `dequantize` set
            quantizer, config, _ = get_hf_quantizer(config, CompressedTensorsConfig(dequantize=True), None, True, {})
    elif method == PACKED_METHOD:
        with readable(f"{path} must have a quantization_config of a packed format"):
            PackedConfig.from_dict(config.quantization_config)
        del config.quantization_config
    elif method is not None:
        raise ValueError(
            f"{path} must be dense or quantized by optimum-quanto, compressed-tensors or here, got {shown(method)}"
        )
    what = f"{path} must have a config.json from which a model can be built"
    with readable(what), warnings.catch_warnings(action="ignore"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if quantizer:
            quantizer.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=[])
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval(), Weights(Path(path), model, quantizer, method == PACKED_METHOD)


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a dense, sparse or quantized checkpoint in evaluation mode. Arguments and errors as for `open_model`."""
    model, weights = open_model(path, dtype, device, trust_remote_code)
    weights.load(device)
    weights.tie()
    return model


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
