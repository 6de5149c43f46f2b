"""ALPS: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", 2024.

The same problem as SparseGPT's, ‖WX − ŴX‖² over weights with a given number of nonzeros, is split in two by a copy D of Ŵ
that is sparse, while Ŵ need not be. The alternating direction method of multipliers (ADMM) brings them together: with the
Hessian H, G = WH and the dual variable V it repeats (algorithm 1)

    Ŵ ← (G − V + ρD)(H + ρI)⁻¹
    D ← Ŵ + V / ρ, of which only the largest entries are kept: in the whole matrix, or N of every M in a row
    V ← V + ρ(Ŵ − D)

Unlike SparseGPT it may change its mind about any weight at any time. ρ decides how firmly D holds: every `PERIOD` iterations
it grows, by the more the more of the mask has just changed (section 3.2), and the search ends when the mask is stable. By then
the weights are nearly the best ones for their mask; `refit` makes them so (section 3.3).

The damped H is scaled to a unit diagonal, as in the published code, so that entries of D compare by their effect and ρ means
the same for all layers; the weights are scaled back at the end.

Unlike in the paper,
- D starts from SparseGPT's result, not from the largest weights of W, which lowers the error of attention's output layers by
  2 to 3 % and that of the others by next to nothing;
- H + ρI is inverted by its Cholesky factor, not from one eigendecomposition of H: for the ten or so values of ρ in a search
  that takes no longer, and float32 is enough;
- ρ never falls: the published code lowers it if the first iterations change nothing, where this search ends;
- exactly `pruned_count(sparsity, numel)` weights are removed, even if entries are tied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.prune.conditioning import Factor, input_scales
from components.prune.selection import keep_largest
from components.prune.sparsegpt import sparsegpt

FIRST_RHO = 0.1
PERIOD = 3  # iterations with the same ρ
GROWTH = [(0.1, 1.3), (0.005, 1.2), (0.0, 1.1)]  # (ρ grows, if a larger share of the mask has changed than this, by this)
STABLE = 0.0003  # share of the mask; it is stable if no more has changed


@torch.no_grad()
def alps(
    weights: Sequence[Tensor],
    factor: Factor,
    sparsities: Sequence[float],
    n_of_m: tuple[int, int] | None = None,
    *,
    iterations: int = 60,
) -> list[tuple[Tensor, Tensor]]:
    """Prune linear layers that have the same inputs.

    Args:
        weights: [out, in] each.
        factor: the factorized Hessian of the layers' inputs, [in, in].
        sparsities: fraction of weights to remove from each layer, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row, instead of choosing in the whole matrix.
        iterations: of ADMM, at most; usually 30 are enough.

    Returns:
        for each layer (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    scales, inverse_scales = input_scales(factor.damped)
    normal = factor.damped * inverse_scales * inverse_scales[:, None]
    found = []
    starts = sparsegpt(weights, factor, sparsities, n_of_m)
    for weight, sparsity, (start, kept) in zip(weights, sparsities, starts, strict=True):
        pruned, kept = _search(weight.float() * scales, normal, start * scales, kept, sparsity, n_of_m, iterations)
        found.append((pruned * inverse_scales, kept))
    return found


def _search(
    dense: Tensor,
    hessian: Tensor,
    sparse: Tensor,
    kept: Tensor,
    sparsity: float,
    n_of_m: tuple[int, int] | None,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """ADMM for one layer in the scale of the normalised Hessian, from (sparse, kept) [out, in]; returns the last of them."""
    target = dense @ hessian
    dual = torch.zeros_like(dense)
    rho, before = FIRST_RHO, kept
    inverse = _inverse(hessian, rho)
    for iteration in range(1, iterations + 1):
        free = (target - dual + rho * sparse) @ inverse
        free.add_(dual, alpha=1 / rho)
        kept = keep_largest(free.abs(), sparsity, n_of_m)
        sparse = free * kept
        dual = (free - sparse).mul_(rho)  # V + ρ(Ŵ − D) = ρ(Ŵ + V / ρ − D)
        if iteration % PERIOD == 0:
            changed = float((kept != before).sum() / kept.sum())
            if changed <= STABLE:
                break
            rho *= next(factor for share, factor in GROWTH if changed > share)
            before, inverse = kept, _inverse(hessian, rho)
    return sparse, kept


def _inverse(hessian: Tensor, rho: float) -> Tensor:
    """(H + ρI)⁻¹."""
    shifted = hessian.clone()
    shifted.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
