"""Exchanges of a kept and a removed weight, wherever the error of a layer's output becomes smaller.

For a row w of a layer with error f(w) = ½ w H wᵀ − g wᵀ (see refit.py) and r = g − wH, to remove the kept weight p and to give
the removed weight q the value v changes the error by

    Δ(v) = r_p w_p + ½ H_pp w_p² − v (r_q + w_p H_pq) + ½ H_qq v²,

which is smallest for v = (r_q + w_p H_pq) / H_qq, where the last two terms are −(r_q + w_p H_pq)² / 2 H_qq. This holds for any
weights, not only at a minimum. Every round makes one exchange in every row, the best of those considered, and brings r up to
date by two rows of H. Considered are the `candidates` kept weights that cost least to remove (r_p w_p + ½ H_pp w_p²) with every
removed weight; all pairs would be as many as a matrix product has operations.

The best exchange for a row is found with the other weights as they are; `refit` adjusts them afterwards. A row loses one weight
and gains one, so all counts stay as they are; N:M patterns exchange within a group.

Hazimeh & Mazumder, "Fast Best Subset Selection", 2020, search for the best subset in least squares by such exchanges.
"""

import torch
from torch import Tensor

from components.prune.refit import lowered

AT_A_TIME = 2**22  # pairs; more would only take memory


@torch.no_grad()
def swap(
    weight: Tensor,
    mask: Tensor,
    hessian: Tensor,
    target: Tensor,
    n_of_m: tuple[int, int] | None = None,
    *,
    rounds: int = 20,
    candidates: int = 4,
) -> tuple[Tensor, Tensor]:
    """Exchange kept for removed weights while that lowers the error.

    Args:
        weight: pruned, [out, in].
        mask: bool [out, in], True = kept.
        hessian: float32 [in, in].
        target: G, float32 [out, in], see `refit`.
        n_of_m: exchange only within each M consecutive weights in a row.
        rounds: most exchanges in a row.
        candidates: kept weights that are considered for removal, in a row or in a group of M.

    Returns:
        (float32 weight [out, in], mask [out, in]); every row keeps as many weights as before, and none has a larger error.
    """
    weight = weight.detach().float() * mask
    descent = target - weight @ hessian
    rows = max(1, AT_A_TIME // (len(hessian) * candidates))
    parts = [
        _swap_rows(*part, hessian, n_of_m[1] if n_of_m else len(hessian), rounds, candidates)
        for part in zip(weight.split(rows), mask.split(rows), descent.split(rows), strict=True)
    ]
    found, kept = (torch.cat(part) for part in zip(*parts, strict=True))
    keep = lowered(weight, found, descent, hessian)
    return torch.where(keep, found, weight), torch.where(keep, kept, mask)


def _swap_rows(
    weight: Tensor, mask: Tensor, residual: Tensor, hessian: Tensor, size: int, rounds: int, candidates: int
) -> tuple[Tensor, Tensor]:
    """Exchange weights in groups of `size` consecutive ones; the other arguments and the result as for `swap`."""
    weight, mask, residual = weight.clone(), mask.clone(), residual.clone()
    groups, candidates = weight.shape[1] // size, min(candidates, size)
    columns = torch.arange(weight.shape[1], device=weight.device).view(groups, size)
    inside = hessian[columns[:, :, None], columns[:, None, :]]  # [groups, size, size]
    diagonal = hessian.diagonal().view(groups, size)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    values, slopes, kept = (each.view(len(weight), groups, size) for each in (weight, residual, mask))
    for _ in range(rounds):
        cost = (values * (slopes + values * diagonal / 2)).masked_fill_(~kept, torch.inf)
        cost, leaving = cost.topk(candidates, dim=2, largest=False)  # [rows, groups, candidates]
        pull = inside[torch.arange(groups, device=weight.device)[:, None], leaving]  # [rows, groups, candidates, size]
        pull.mul_(values.gather(2, leaving)[..., None]).add_(slopes[:, :, None])
        change = (pull.square().mul_(inverse[:, None] / -2)).masked_fill_(kept[:, :, None], torch.inf).add_(cost[..., None])
        best, place = change.flatten(1).min(dim=1)  # [rows]
        moving = (best < 0).nonzero()[:, 0]
        if not len(moving):
            break
        group, candidate, coming = torch.unravel_index(place[moving], change.shape[1:])
        out, into = group * size + leaving[moving, group, candidate], group * size + coming
        value = pull[moving, group, candidate, coming] * inverse[group, coming]
        residual[moving] += weight[moving, out, None] * hessian[out] - value[:, None] * hessian[into]
        weight[moving, out], weight[moving, into] = 0, value
        mask[moving, out], mask[moving, into] = False, True
    return weight, mask
