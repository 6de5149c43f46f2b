"""INT8 weights with compressed-tensors, for machines without optimum-quanto, and for what that does not know: experts.

transformers and inference servers can load the result directly; that of a mixture of experts, transformers only with
`quantization_config=CompressedTensorsConfig(dequantize=True)`. Quantization is symmetric with one scale per row (the largest
magnitude over 127), so zeros stay zero.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor, pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from torch import Tensor

from components.core.blocks import stacks
from components.core.checkpoint.weights import Weights
from components.core.files import write_json
from components.core.progress import quiet_bars
from components.core.reading import read_json
from components.quantize.config import QuantizeConfig
from components.quantize.part import Part, Stored

NAME = "compressed-tensors"
LARGEST = 127  # of the integers
STACK_SCALE = "_stack_scale"  # of all experts, until `named` takes them apart


def settings(exclude: list[str]) -> QuantizationConfig:
    """INT8 for all linear layers except those that are excluded, by names or patterns of the library."""
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return QuantizationConfig(config_groups={"linears": scheme}, ignore=exclude, quantization_status=QuantizationStatus.FROZEN)


def quantize(part: Part, config: QuantizeConfig) -> dict[str, Tensor]:
    """Quantize a part's linear layers and experts in place, except those that are excluded.

    Returns:
        its tensors by the names in its module, of which `named` makes what is stored.
    """
    assert config.format == "int8"
    module, exclude = part.module, part.exclude
    with quiet_bars():
        apply_quantization_config(module, settings(exclude))
        for name, scale in module.named_parameters():
            if name.endswith("weight_scale"):
                weight = module.get_parameter(name.removesuffix("_scale"))
                scale.data.copy_(_scale(weight.data))
        ModelCompressor.from_pretrained_model(module).compress_model(module)
    for name, inner in module.named_modules():
        for kind, weights in stacks(inner).items():
            if f"{name}.{kind}" not in exclude:
                stack_scale = _scale(weights.data)
                delattr(inner, kind)
                rounded = (weights.data.float() / stack_scale.float()).round().clamp(-LARGEST, LARGEST)
                inner.register_buffer(kind, rounded.to(torch.int8))
                inner.register_buffer(f"{kind}{STACK_SCALE}", stack_scale)
    return part.tensors()


def _scale(weight: Tensor) -> Tensor:
    """Scale [..., out, 1] of a matrix, or of those of several experts [..., out, in]; 1 for a row of zeros."""
    scale = weight.abs().amax(-1, keepdim=True) / LARGEST
    return torch.where(scale == 0, 1, scale)


def named(weights: Weights, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a part's `state_dict` by the names under which they are stored; each expert's matrices have their own."""
    scales = {name.removesuffix(STACK_SCALE): scale for name, scale in tensors.items() if name.endswith(STACK_SCALE)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in scales and not name.endswith(STACK_SCALE)}
    made = weights.stored_names(plain)
    scale_of = weights.stored_names(scales)
    for name, integers in weights.stored_names({name: tensors[name] for name in scales}).items():
        made[f"{name}_packed"], made[f"{name}_scale"] = pack_to_int32(integers, 8), scale_of[name]
        made[f"{name}_shape"] = torch.tensor(integers.shape)
    return made


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


def stored(tensors: Mapping[str, Tensor], name: str) -> Stored:
    """The integers [out, in] of a weight, or of those of all experts [experts, out, in], from a part's `state_dict`."""
    if f"{name}{STACK_SCALE}" in tensors:
        return Stored(tensors[name])
    shape = torch.Size(tensors[f"{name}_shape"].tolist())
    return Stored(unpack_from_int32(tensors[f"{name}_packed"], 8, shape))
