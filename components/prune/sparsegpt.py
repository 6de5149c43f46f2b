"""SparseGPT: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.

Layer-wise problem (eq. 1): argmin over mask M and weights Ŵ of ‖WX − (M ⊙ Ŵ)X‖². Columns are visited left to right. With
H = XXᵀ and U the upper Cholesky factor of the damped H⁻¹ (so that U[j, j:] is row j of the inverse Hessian of the weights
not yet visited, up to the factor U[j, j]; section 3.2), removing weight w at column j

    costs   ε = w² / U[j, j]²                          (eq. 3, the score by which the mask is chosen)
    and     w_k ← w_k − (w / U[j, j]) · U[j, k], k ≥ j  (eq. 4, adjusts the weights not yet visited)

The mask is chosen for `block_size` columns at a time (algorithm 1), or with an N:M pattern for each group of M columns when
the first of them is reached. Updates within a block of columns are applied immediately, those to later columns in one matrix
product.

Layers with the same inputs (q, k and v; gate and up) have the same U, so they are pruned in one pass, each with its own mask.

Unlike in the public reference implementation, exactly `pruned_count(sparsity, numel)` weights are removed, even if scores are
tied. All arithmetic is float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.core.mask.mask import pruned_count
from components.prune.conditioning import Factor


@torch.no_grad()
def sparsegpt(
    weights: Sequence[Tensor],
    factor: Factor,
    sparsities: Sequence[float],
    n_of_m: tuple[int, int] | None = None,
    *,
    block_size: int = 128,
) -> list[tuple[Tensor, Tensor]]:
    """Prune linear layers that have the same inputs.

    Args:
        weights: [out, in] each.
        factor: the factorized Hessian of the layers' inputs, [in, in].
        sparsities: fraction of weights to remove from each layer, in [0, 1).
        n_of_m: keep N of every M consecutive weights in a row, instead of choosing across the whole block of columns.
        block_size: columns whose mask is chosen together; a multiple of M.

    Returns:
        for each layer (float32 pruned weight [out, in], bool mask [out, in], True = kept).
    """
    rows = [len(weight) for weight in weights]
    # transposed, so that a column of the weights is contiguous memory: [in, out of all layers]
    columns = torch.cat([weight.detach().float() for weight in weights]).T.contiguous()
    columns[factor.dead] = 0  # weights without effect, which are the first to be removed
    upper = factor.upper
    kept = torch.ones_like(columns, dtype=torch.bool)
    removed = [0] * len(rows)
    for start in range(0, len(columns), block_size):
        end = min(start + block_size, len(columns))
        block, block_kept = columns[start:end], kept[start:end]  # views: [block, out]
        local = upper[start:end, start:end]  # [block, block]
        scale = local.diagonal()[:, None]  # [block, 1]
        if n_of_m is None:
            scores = (block / scale).square()
            for number, (part, part_kept) in enumerate(zip(scores.split(rows, 1), block_kept.split(rows, 1), strict=True)):
                target = pruned_count(sparsities[number], rows[number] * end)
                lowest = part.flatten().topk(target - removed[number], largest=False, sorted=False).indices
                flags = torch.ones(part.numel(), dtype=torch.bool, device=part.device).index_fill_(0, lowest, False)
                part_kept.copy_(flags.view_as(part))
                removed[number] = target
        errors = torch.empty_like(block)
        for column in range(end - start):
            if n_of_m and (start + column) % n_of_m[1] == 0:
                group = slice(column, column + n_of_m[1])
                scores = (block[group] / scale[group]).square()
                lowest = scores.topk(n_of_m[1] - n_of_m[0], dim=0, largest=False, sorted=False).indices
                block_kept[group] = block_kept[group].scatter(0, lowest, False)
            error = torch.div(block[column], scale[column], out=errors[column])  # [out]: of the values to remove
            error.masked_fill_(block_kept[column], 0)
            block[column + 1 :].addr_(local[column, column + 1 :], error, alpha=-1)
        block.masked_fill_(~block_kept, 0)  # exactly zero, whatever the rounding
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    parts = zip(columns.split(rows, 1), kept.split(rows, 1), strict=True)
    return [(weight.T.contiguous(), mask.T.contiguous()) for weight, mask in parts]
