"""Wanda: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2024.

A weight counts for as much as it can contribute to the output, given the size of its input (eq. 1),

    S = |W| · ‖X‖₂, the norm of each input over all calibration tokens,

and weights are compared within a row, since every output has to keep some of its inputs. The weights that stay are not changed.

‖X‖₂ is the root of the Hessian's diagonal, up to a factor that all inputs have in common. Unlike in the paper, exactly
`pruned_count(sparsity, numel)` weights are removed from a matrix: if its rows cannot all lose the same number, the first ones
lose one more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.core.mask.mask import pruned_count
from components.prune.conditioning import input_scales
from components.prune.selection import keep_largest


@torch.no_grad()
def wanda(
    weights: Sequence[Tensor], hessian: Tensor, sparsities: Sequence[float], n_of_m: tuple[int, int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Prune linear layers that have the same inputs.

    Args:
        weights: [out, in] each.
        hessian: float32 [in, in], computed from the layers' inputs.
        sparsities: fraction of weights to remove from each layer, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row.

    Returns:
        for each layer (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    sizes = input_scales(hessian)[0]
    pruned = []
    for weight, sparsity in zip(weights, sparsities, strict=True):
        scores = weight.detach().float().abs() * sizes
        kept = keep_largest(scores, sparsity, n_of_m) if n_of_m else _keep_in_rows(scores, sparsity)
        pruned.append((weight.float() * kept, kept))
    return pruned


def _keep_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    """The mask that keeps the largest scores of each row; of equal ones, the later."""
    rows = len(scores)
    fewest, more = divmod(pruned_count(sparsity, scores.numel()), rows)
    removed = torch.full((rows, 1), fewest, device=scores.device)
    removed[:more] += 1
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= removed
