"""The numbers that the packed formats can hold: integers times a bfloat16 scale, and how scales are chosen.

With 8 bits, a row has one scale, its largest magnitude over 127, rounded up so that nothing is cut off. With 4 bits, each span
of columns has one: of a few candidates, the one that gives the least squared error to the span's kept values. Integers go from
-8 to 7, so the sign of a scale is chosen so that the value of largest magnitude is negative: it has eight steps, not seven.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.core.packed.record import COLUMNS, Packed

PER_SCALE = 32  # kept values that are to share a scale of 4-bit integers
CLIPS = [step / 32 for step in range(18, 38)]  # of the largest magnitude, what -8 stands for


@dataclass(frozen=True)
class Grid:
    """What a matrix can be rounded to.

    Attributes:
        bits: 8 or 4.
        span: columns of which a row has one scale.
    """

    bits: int
    span: int

    @property
    def lowest(self) -> int:
        """The smallest integer."""
        return -127 if self.bits == 8 else -8

    @property
    def highest(self) -> int:
        """The largest integer."""
        return 127 if self.bits == 8 else 7


def grid_of(bits: int, width: int, density: float) -> Grid:
    """The grid of a matrix.

    Args:
        bits: 8 or 4.
        width: its columns.
        density: share of its weights that are kept.
    """
    chunks = -(-width // COLUMNS)
    if bits == 4:
        chunks = max(1, min(chunks, round(PER_SCALE / max(density, 1e-3) / COLUMNS)))
    return Grid(bits, chunks * COLUMNS)


def scales_of(weights: Tensor, grid: Grid) -> Tensor:
    """The scales of one span of rows, bfloat16 [out]; 0 where there is nothing but zeros.

    Args:
        weights: float32 [out, at most span]; those that are not kept are zero.
        grid: what they are rounded to.
    """
    largest, place = weights.abs().max(1, keepdim=True)  # [out, 1]
    if grid.bits == 8:
        return _rounded_up(largest[:, 0] / grid.highest)
    unit = -weights.gather(1, place).sign() * largest / -grid.lowest
    best = torch.zeros_like(unit, dtype=torch.bfloat16)
    least = torch.full_like(unit, torch.inf)
    for clip in CLIPS:
        scale = (unit * clip).bfloat16()
        error = (rounded(weights, scale, grid) * scale.float()).sub_(weights).square_().sum(1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best[:, 0]


def _rounded_up(values: Tensor) -> Tensor:
    """Positive float32 → the nearest bfloat16 that is not smaller."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).bfloat16()


def rounded(weights: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The integers nearest to weights [out, columns], as float32; scales [out, 1]."""
    inverse = torch.where(scales == 0, 0, 1 / scales.float())
    return (weights * inverse).round_().clamp_(grid.lowest, grid.highest)


def nearest(weights: Tensor, kept: Tensor | None, grid: Grid) -> Packed:
    """Round each kept weight to the nearest number that the format has.

    Args:
        weights: [out, in]; those that are not kept are zero.
        kept: bool [out, in]; None = all.
        grid: what they are rounded to.
    """
    integers = torch.empty_like(weights, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = []
    for start in range(0, weights.shape[1], grid.span):
        part = weights[:, start : start + grid.span].float()
        scales.append(scales_of(part, grid))
        integers[:, start : start + grid.span] = rounded(part, scales[-1][:, None], grid).to(torch.int8)
    return Packed(integers, kept, torch.stack(scales, 1), grid.bits, grid.span)
