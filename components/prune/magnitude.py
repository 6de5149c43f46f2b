"""Magnitude pruning: remove a layer's smallest weights, as a plain baseline for the Hessian-aware methods.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, here applied per layer and in one shot.
"""

import torch
from torch import Tensor

from components.prune.selection import keep_largest


@torch.no_grad()
def magnitude(weight: Tensor, sparsity: float, n_of_m: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Prune one linear layer.

    Args:
        weight: [out, in].
        sparsity: fraction of weights to remove, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row.

    Returns:
        (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    weight = weight.detach().float()
    kept = keep_largest(weight.abs(), sparsity, n_of_m)
    return weight * kept, kept
