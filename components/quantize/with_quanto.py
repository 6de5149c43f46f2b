"""INT8 and FP8 weights with optimum-quanto: symmetric, one scale per row, zeros stay zero."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.quanto import freeze, qfloat8_e4m3fn, qint8, quantization_map
from optimum.quanto import quantize as quantize_modules
from optimum.quanto.tensor.optimizers import AbsmaxOptimizer
from torch import Tensor

from components.core.checkpoint.files import QUANTO_FILE
from components.core.checkpoint.weights import DATA, Weights
from components.core.files import write_json
from components.quantize.config import QuantizeConfig
from components.quantize.part import Part, Stored

NAME = "optimum-quanto"
QTYPES = {"int8": qint8, "fp8": qfloat8_e4m3fn}


class NonzeroScale(AbsmaxOptimizer):
    """The usual scale, a row's largest magnitude over that of the format, but 1 for a row of zeros.

    Pruning can zero a whole row; optimum-quanto would divide it by 0 and, in FP8, store the resulting NaN.
    """

    def optimize(self, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scale [out, 1] of a weight [out, in]."""
        scale: Tensor = super().optimize(base, *args, **kwargs)
        return torch.where(scale == 0, 1, scale)


def quantize(part: Part, config: QuantizeConfig) -> dict[str, Tensor]:
    """Quantize a part's linear layers in place, except those whose names match a pattern in its `exclude`.

    Returns:
        what is stored of it, by the names in its module.
    """
    quantize_modules(part.module, weights=QTYPES[config.format], optimizer=NonzeroScale(), exclude=part.exclude)
    freeze(part.module)
    return part.tensors()


def named(weights: Weights, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a part's `state_dict` by the names under which they are stored: its loader looks for those of the modules."""
    return tensors


def finish(model: Any, format: str, exclude: list[str], folder: Path) -> None:
    """Add to a checkpoint's folder what tells that it is quantized, and how.

    Args:
        model: the dense model, its parameters on the meta device; it is changed.
        format: `int8` or `fp8`.
        exclude: names of the layers that are not quantized.
        folder: has the configuration of the dense model.
    """
    quantize_modules(model, weights=QTYPES[format], exclude=exclude)
    write_json(folder / QUANTO_FILE, quantization_map(model))


def stored(tensors: Mapping[str, Tensor], name: str) -> Stored:
    """The integers or float8 [out, in] of a weight, from the tensors that are stored."""
    return Stored(tensors[f"{name}{DATA}"])
