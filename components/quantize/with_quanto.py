"""INT8 and FP8 weights with optimum-quanto: symmetric, one scale per row, zeros stay zero."""

import functools
from typing import Any

import torch
from optimum.quanto import QuantizedModelForCausalLM, qfloat8_e4m3fn, qint8
from optimum.quanto.tensor.optimizers import AbsmaxOptimizer
from torch import Tensor, nn

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


def quantize(model: Any, format: str, head: str) -> Any:
    """Quantize all linear layers except the head, in place; returns an object with `save_pretrained`."""
    quantized = QuantizedModelForCausalLM.quantize(model, weights=QTYPES[format], optimizer=NonzeroScale(), exclude=head)
    # its loader looks weights up by the names of the modules, while transformers would write those of older checkpoints
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return quantized


def stored(module: nn.Module) -> Tensor:
    """The quantized data of a reloaded linear layer: int8 or float8 [out, in]."""
    data = getattr(module.weight, "_data", None)
    assert isinstance(data, Tensor)
    assert data.dtype in (torch.int8, torch.float8_e4m3fn)
    return data
