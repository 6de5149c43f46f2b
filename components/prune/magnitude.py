"""Magnitude pruning: remove a layer's smallest weights, as a plain baseline for the Hessian-aware methods.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, here applied per layer and in one shot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.prune.selection import keep_largest


@torch.no_grad()
def magnitude(weights: Sequence[Tensor], sparsity: float, n_of_m: tuple[int, int] | None = None) -> list[tuple[Tensor, Tensor]]:
    """Prune linear layers, each to the same sparsity.

    Args:
        weights: [out, in] each.
        sparsity: fraction of weights to remove, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row.

    Returns:
        for each layer (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    masks = [keep_largest(weight.detach().abs(), sparsity, n_of_m) for weight in weights]
    return [(weight.detach().float() * kept, kept) for weight, kept in zip(weights, masks, strict=True)]
