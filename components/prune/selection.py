"""Which weights of a matrix to keep, by their scores: exactly as many as asked for, however many scores are equal."""

import torch
from torch import Tensor

from components.core.mask.mask import pruned_count


def keep_largest(scores: Tensor, sparsity: float, n_of_m: tuple[int, int] | None) -> Tensor:
    """The mask that keeps the largest scores of a matrix.

    Args:
        scores: [out, in].
        sparsity: fraction of weights to remove from the whole matrix, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row instead.

    Returns:
        bool [out, in], True = kept. Of equal scores that compete for the last places, the later ones are kept.
    """
    if n_of_m:
        groups = scores.reshape(-1, n_of_m[1])  # [out · in / M, M]
        best = groups.topk(n_of_m[0], dim=1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(1, best, True).view_as(scores)
    removed = pruned_count(sparsity, scores.numel())
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(removed).values  # far faster than sorting, or than topk with so many places
    kept = flat > threshold
    places = flat.numel() - removed - int(kept.sum())
    if places:
        kept[(flat == threshold).nonzero()[-places:, 0]] = True
    return kept.view_as(scores)
