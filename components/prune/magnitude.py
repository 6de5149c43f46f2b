"""Magnitude pruning: remove the smallest weights of a layer. The plain baseline that Hessian-aware methods are held against.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, here per layer and in one shot.
"""

import torch
from torch import Tensor

from components.core.mask.mask import pruned_count


@torch.no_grad()
def magnitude(weight: Tensor, sparsity: float, n_of_m: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Prune one linear layer.

    Args:
        weight: [out, in].
        sparsity: share of weights to remove, in [0, 1).
        n_of_m: keep N of every M neighbours in a row.

    Returns:
        (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    weight = weight.detach().float()
    if n_of_m:
        groups, count = weight.reshape(-1, n_of_m[1]), n_of_m[1] - n_of_m[0]  # [rows · in / M, M]
    else:
        groups, count = weight.reshape(1, -1), pruned_count(sparsity, weight.numel())
    lowest = groups.abs().topk(count, dim=1, largest=False, sorted=False).indices
    kept = torch.ones_like(groups, dtype=torch.bool).scatter(1, lowest, False).view_as(weight)
    return weight * kept, kept
