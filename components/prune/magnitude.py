"""Magnitude pruning: remove a layer's smallest weights, as a plain baseline for the Hessian-aware methods.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, here applied per layer and in one shot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.prune.selection import keep_largest


@torch.no_grad()
def magnitude(
    weights: Sequence[Tensor], sparsities: Sequence[float], n_of_m: tuple[int, int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Prune linear layers.

    Args:
        weights: [out, in] each.
        sparsities: fraction of weights to remove from each layer, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row.

    Returns:
        for each layer (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    pairs = zip(weights, sparsities, strict=True)
    masks = [keep_largest(weight.detach().abs(), sparsity, n_of_m) for weight, sparsity in pairs]
    return [(weight.detach().float() * kept, kept) for weight, kept in zip(weights, masks, strict=True)]
