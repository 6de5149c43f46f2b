"""Layers to prune: weights, and Hessians of inputs like those of a model or worse."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.prune import alps as alps_method
from components.prune import magnitude as magnitude_method
from components.prune import sparsegpt as sparsegpt_method
from components.prune import wanda as wanda_method
from components.prune.conditioning import inverse_factor

Patterns = tuple[int, int] | None


def sparsegpt(
    weights: Sequence[Tensor],
    hessian: Tensor,
    sparsity: float,
    n_of_m: Patterns = None,
    damping: float = 0.01,
    what: str = "layer",
    **more: Any,
) -> list[tuple[Tensor, Tensor]]:
    """The method from the Hessian on."""
    factor = inverse_factor(hessian, damping, what)
    return sparsegpt_method.sparsegpt(weights, factor, [sparsity] * len(weights), n_of_m, **more)


def alps(
    weights: Sequence[Tensor], hessian: Tensor, sparsity: float, n_of_m: Patterns = None, damping: float = 0.01
) -> list[tuple[Tensor, Tensor]]:
    """The method from the Hessian on."""
    factor = inverse_factor(hessian, damping, "layer")
    return alps_method.alps(weights, factor, [sparsity] * len(weights), n_of_m)


def wanda(weights: Sequence[Tensor], hessian: Tensor, sparsity: float, n_of_m: Patterns = None) -> list[tuple[Tensor, Tensor]]:
    """The method with one sparsity."""
    return wanda_method.wanda(weights, hessian, [sparsity] * len(weights), n_of_m)


def magnitude(weights: Sequence[Tensor], sparsity: float, n_of_m: Patterns = None) -> list[tuple[Tensor, Tensor]]:
    """The method with one sparsity."""
    return magnitude_method.magnitude(weights, [sparsity] * len(weights), n_of_m)


def layer(rows: int, columns: int, seed: int = 0, samples: int = 200) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), 2 / samples * inputs.T @ inputs


def awkward_layer(kind: str, rows: int = 6, columns: int = 24) -> tuple[Tensor, Tensor]:
    """A layer, float32, of one of the kinds in `AWKWARD`."""
    weight, hessian = layer(rows, columns, samples=10 if kind == "fewer tokens than inputs" else 200)
    if kind == "dead inputs":
        hessian[[3, 8]] = 0
        hessian[:, [3, 8]] = 0
    if kind == "a sink":
        sink = torch.zeros(columns, dtype=torch.float64)
        sink[5] = 1e4
        hessian += torch.outer(sink, sink)
    return weight.float(), hessian.float()


def damp(hessian: Tensor, damping: float) -> Tensor:
    """The damped Hessian."""
    diagonal = hessian.diagonal()
    middle = diagonal[diagonal > 0].quantile(0.5)
    return hessian + damping * torch.where(diagonal > 0, diagonal.clamp_min(middle), 0).diag()


AWKWARD = ("plain", "fewer tokens than inputs", "dead inputs", "a sink")


def error_of(dense: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """‖WX − ŴX‖² in float64, up to the factor in the Hessian."""
    change = (sparse - dense).double()
    return float(((change @ hessian.double()) * change).sum())


def inputs_with_a_sink(tokens: int, width: int) -> Tensor:
    """Correlated inputs [tokens, width]; the first four tokens have values a thousand times as large in three inputs."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, width, generator=generator)
    inputs = strong + torch.randn(tokens, width, generator=generator)
    inputs[:4, [3, 17, 40]] *= 1000
    return inputs
