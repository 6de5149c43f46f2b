"""INT8 weights with compressed-tensors, for machines without optimum-quanto.

transformers and inference servers can load the result directly. Quantization is symmetric with one scale per row (the largest
magnitude over 127), so zeros stay zero.
"""

from pathlib import Path
from typing import Any

from compressed_tensors.compressors import ModelCompressor
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


class Compressed:
    """A model with quantized weights that can be saved."""

    def __init__(self, model: Any, compressor: ModelCompressor) -> None:
        self.model, self.compressor = model, compressor

    def save_pretrained(self, folder: Path) -> None:
        """Write weights and configuration."""
        self.model.save_pretrained(folder)
        self.compressor.update_config(folder)
        config = read_json(folder / "config.json", dict[str, Any])
        # the library writes an empty entry; vLLM rejects any model that has one
        config["quantization_config"].pop("sparsity_config", None)
        write_json(folder / "config.json", config)


def quantize(model: Any, format: str, head: str) -> Compressed:
    """Quantize all linear layers except the head to int8, in place."""
    assert format == "int8"
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    settings = QuantizationConfig(
        config_groups={"linears": scheme}, ignore=[head], quantization_status=QuantizationStatus.FROZEN
    )
    with quiet_bars():
        apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            largest = module.weight.data.abs().amax(1, keepdim=True)  # [out, 1]
            module.weight_scale.data.copy_((largest / 127).clamp_min(1e-8))
    compressor = ModelCompressor.from_pretrained_model(model)
    with quiet_bars():
        compressor.compress_model(model)
    return Compressed(model, compressor)


def stored(module: nn.Module) -> Tensor:
    """Weight [out, in] of a reloaded linear layer, decompressed on load: integers times a positive scale."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
