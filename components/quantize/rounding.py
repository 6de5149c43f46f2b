"""How the kept weights of matrices are rounded to the numbers of a packed format.

`nearest` rounds each by itself. `gptq` (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022) lets the weights that are not rounded yet make up for the errors of those that are, which is the
compensation of SparseGPT (section 3.5 there) with the mask given. Columns are visited left to right. With U the upper Cholesky
factor of the damped inverse Hessian, the error of column j, which is to become ŵ, the rounded weight where it is kept and 0
elsewhere, changes those not yet visited:

    w_k ← w_k − (w_j − ŵ_j) / U[j, j] · U[j, k],  k > j

What that moves away from zero outside the mask becomes zero again when its own column is visited, and is compensated in turn.
Scales are chosen when the first column of their span is reached, of the weights as they are then.

Much of that compensation goes to weights outside the mask, where it cannot stay. So the integers are then improved one column
at a time, with all others and the scales as they are (coordinate descent, as in Behdin et al., "QuantEase", 2023, with a mask):
for the error E = Ŵ − W, the best value of column j is

    ŵ_j − (E H)_j / H[j, j]

rounded, where it is kept. No step makes the squared output error tr(E H Eᵀ) larger. Damping is that of pruning
(`components.prune.conditioning`); all is float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from components.core.blocks import matrices, weights_of
from components.core.packed.grid import Grid, grid_of, nearest, rounded, scales_of
from components.core.packed.record import COLUMNS, Packed
from components.prune.calibration import hessians, observe
from components.prune.conditioning import Factor, inverse_factor
from components.quantize.part import Part

DAMPING = 0.01
SWEEPS = 4  # over all columns; later ones change little


def round_matrices(part: Part, bits: int) -> dict[str, Packed]:
    """Round all matrices of a part but those that are excluded: by `gptq` if it has calibration text, else by `nearest`.

    Returns:
        name of a weight in the part's module → what becomes of it.

    Raises:
        ValueError: a matrix sees no calibration text, or its Hessian cannot be factorized.
    """
    layers = {name: matrix.parameter for name, matrix in matrices(part.module).items() if name not in part.exclude}
    weights = weights_of(part.module)
    kept = {name: stored_places(part.kept, parameter) for name, parameter in layers.items()}
    grids = {name: grid_of(bits, weights[name].shape[1], density(kept[name])) for name in layers}
    if part.batches is None:
        return {parameter: nearest(weights[name], kept[name], grids[name]) for name, parameter in layers.items()}
    made: dict[str, Packed] = {}
    for group in hessians(part.module, observe(part.module, part.batches(), layers), part.name):
        assert group.hessian is not None
        factor = inverse_factor(group.hessian, DAMPING, ", ".join(f"{part.name}.{name}" for name in group.names))
        for name in group.names:
            made[layers[name]] = gptq(weights[name], kept[name], factor, grids[name])
    return made


def stored_places(kept: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Which weights of a matrix are stored, bool [out, in]; None = all."""
    return None if name not in kept or bool(kept[name].all()) else kept[name]


def density(kept: Tensor | None) -> float:
    """The share of weights that are kept."""
    return 1.0 if kept is None else int(kept.sum()) / kept.numel()


@torch.no_grad()
def gptq(weights: Tensor, kept: Tensor | None, factor: Factor, grid: Grid) -> Packed:
    """Round a matrix so that its outputs change little.

    Args:
        weights: [out, in]; zero where they are not kept.
        kept: bool [out, in]; None = all.
        factor: the factorized Hessian of the inputs, [in, in].
        grid: what they are rounded to.
    """
    columns = weights.float().T.contiguous()  # [in, out]: a column of the weights is contiguous memory
    stays = torch.ones_like(columns, dtype=torch.bool) if kept is None else kept.T.contiguous()
    integers = torch.empty_like(columns, dtype=torch.int8)
    scales: list[Tensor] = []
    upper = factor.upper
    for start in range(0, len(columns), COLUMNS):
        end = min(start + COLUMNS, len(columns))
        if start % grid.span == 0:
            last = start + grid.span
            scales.append(scales_of((columns[start:last] * stays[start:last]).T.contiguous(), grid))
        scale = scales[-1].float()
        block, local = columns[start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for column in range(end - start):
            whole = rounded(block[column, :, None], scale[:, None], grid)[:, 0] * stays[start + column]
            integers[start + column] = whole.to(torch.int8)
            error = torch.sub(block[column], whole * scale, out=errors[column]).div_(local[column, column])
            block[column + 1 :].addr_(local[column, column + 1 :], error, alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    chosen = torch.stack(scales, 1)
    improve(integers, weights.float().T, stays, chosen, factor.damped, grid)
    return Packed(integers.T.contiguous(), kept, chosen, grid.bits, grid.span)


def improve(integers: Tensor, columns: Tensor, stays: Tensor, scales: Tensor, hessian: Tensor, grid: Grid) -> None:
    """Coordinate descent over the integers of a matrix, in place.

    Args:
        integers: int8 [in, out].
        columns: the weights, float32 [in, out].
        stays: bool [in, out], which weights are kept.
        scales: bfloat16 [out, spans].
        hessian: float32 [in, in].
        grid: what they are rounded to.
    """
    wide = scales.float().T.repeat_interleave(grid.span, 0)[: len(columns)]  # [in, out]
    now = integers * wide
    slope = hessian @ (now - columns)  # (E H)ᵀ, [in, out]
    diagonal = hessian.diagonal()
    seen = torch.where(diagonal > 0, 1 / diagonal, 0)  # nothing is known of an input that is always zero
    for _ in range(SWEEPS):
        for start in range(0, len(columns), COLUMNS):
            end = min(start + COLUMNS, len(columns))
            local, inner = slope[start:end].clone(), hessian[start:end, start:end]
            moves = torch.empty_like(local)
            for column in range(end - start):
                place = start + column
                best = now[place] - local[column] * seen[place]
                value = rounded(best[:, None], scales[:, place // grid.span, None], grid)[:, 0] * stays[place]
                integers[place] = value.to(torch.int8)
                torch.sub(value * wide[place], now[place], out=moves[column])
                now[place] += moves[column]
                local[column + 1 :].addr_(inner[column + 1 :, column], moves[column])
            slope.addmm_(hessian[:, start:end], moves)
