"""INT8 weights with compressed-tensors, for machines without optimum-quanto.

transformers and inference servers can load the result directly. Quantization is symmetric with one scale per row (the largest
magnitude over 127), so zeros stay zero.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from torch import Tensor, nn

from components.core.files import write_json
from components.core.progress import quiet_bars
from components.core.reading import read_json

NAME = "compressed-tensors"
ORIGINAL_NAMES = True


def settings(exclude: list[str]) -> QuantizationConfig:
    """INT8 for all linear layers except those that are excluded, by names or patterns of the library."""
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return QuantizationConfig(config_groups={"linears": scheme}, ignore=exclude, quantization_status=QuantizationStatus.FROZEN)


def quantize(module: nn.Module, format: str, exclude: list[str]) -> None:
    """Quantize a module's linear layers in place, except those that are excluded. Its `state_dict` is what is stored."""
    assert format == "int8"
    with quiet_bars():
        apply_quantization_config(module, settings(exclude))
        for name, scale in module.named_parameters():
            if name.endswith("weight_scale"):
                weight = module.get_parameter(name.removesuffix("_scale"))
                largest = weight.data.abs().amax(1, keepdim=True)  # [out, 1]
                scale.data.copy_((largest / 127).clamp_min(1e-8))
        ModelCompressor.from_pretrained_model(module).compress_model(module)


def finish(model: Any, format: str, exclude: list[str], folder: Path) -> None:
    """Add to a checkpoint's folder what tells that it is quantized, and how. Arguments as in `with_quanto.finish`."""
    assert format == "int8"
    with quiet_bars():
        apply_quantization_config(model, settings(exclude))
        ModelCompressor.from_pretrained_model(model).update_config(folder)
    config = read_json(folder / "config.json", dict[str, Any])
    # the library writes an empty entry; vLLM rejects any model that has one
    config["quantization_config"].pop("sparsity_config", None)
    write_json(folder / "config.json", config)


def stored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The integers [out, in] of a weight, from the tensors that are stored."""
    shape = torch.Size(tensors[f"{name}_shape"].tolist())
    integers: Tensor = unpack_from_int32(tensors[f"{name}_packed"], 8, shape)
    return integers
