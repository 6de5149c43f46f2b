"""INT8 and FP8 weights by optimum-quanto: symmetric, one scale a row, zeros stay zero."""

from typing import Any

import torch
from optimum.quanto import QuantizedModelForCausalLM, qfloat8_e4m3fn, qint8
from optimum.quanto.tensor.optimizers import AbsmaxOptimizer
from torch import Tensor, nn

NAME = "optimum-quanto"
QTYPES = {"int8": qint8, "fp8": qfloat8_e4m3fn}


class NonzeroScale(AbsmaxOptimizer):
    """The usual scale, largest magnitude of a row over the format's, but 1 for a row of zeros.

    Pruning can empty a row; optimum-quanto would divide it by 0, and the NaN that results is stored in FP8.
    """

    def optimize(self, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scale [out, 1] of a weight [out, in]."""
        scale: Tensor = super().optimize(base, *args, **kwargs)
        return torch.where(scale == 0, 1, scale)


def quantize(model: Any, format: str, head: str) -> Any:
    """Quantize all linears but the head, in place; returns what has `save_pretrained`."""
    return QuantizedModelForCausalLM.quantize(model, weights=QTYPES[format], optimizer=NonzeroScale(), exclude=head)


def stored(module: nn.Module) -> Tensor:
    """The quantized data of a reloaded linear: int8 or float8 [out, in]."""
    data = getattr(module.weight, "_data", None)
    assert isinstance(data, Tensor)
    assert data.dtype in (torch.int8, torch.float8_e4m3fn)
    return data
