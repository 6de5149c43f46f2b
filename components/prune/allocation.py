"""Uneven sparsity: which layers keep more of their weights, under the total that an even sparsity would keep.

A plan says by how much denser a layer is to be than the rest. `budgeted` turns it into sparsities: all layers are made
denser or sparser alike until the total is right, within bounds that no layer crosses. The plans are

    slope: linear over depth, from +d at the first block to −d at the last
    owl:   by the outliers of a block (Yin et al., "Outlier Weighed Layerwise Sparsity", 2024, section 3): with the Wanda scores
           A = |W| · ‖X‖₂ of all its layers, the share D of entries above M times their mean; densities are linear in D, from
           the fewest to the most, in a range of 2λ
    parts: one part of every block denser than the others, such as attention

Unlike in the paper, layers that differ in size have sparsities whose total is exact; the paper's have the mean of the blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.core.mask.mask import pruned_count
from components.prune.config import HIGHEST, UNIFORM

OUTLIER, RANGE = 5.0, 0.08  # M and λ, the values of the paper's experiments
SLOPES = (0.1, 0.05, -0.05)  # d; the first is what `slope` means: of 0.05, 0.1 and 0.15, it did best for SmolLM2 at 70 %
PART = 0.05  # by how much a part of all blocks is denser

Plan = Mapping[str, float]  # name of a layer's weight → by how much denser it is to be, as a share of its weights; 0 if missing


@dataclass(frozen=True)
class Layer:
    """A linear layer: the number of its block, the part of it that the layer is in, and the number of its weights."""

    block: int
    part: str
    size: int


def budgeted(plan: Plan, layers: Mapping[str, Layer], sparsity: float) -> dict[str, float]:
    """The sparsity of each layer, by name, such that exactly as many weights are removed in all as `sparsity` says.

    A layer keeps n · (1 − sparsity + plan + c) of its n weights, with one c for all; but at most all of them, at least
    n · (1 − `HIGHEST`), and at least one. What rounding leaves goes to the layers that lose most by it, one weight each.
    """
    sizes = [layer.size for layer in layers.values()]
    wanted = [1 - sparsity + plan.get(name, 0.0) for name in layers]

    def kept(more: float) -> list[float]:
        pairs = zip(sizes, wanted, strict=True)
        return [min(max(size * (density + more), size * (1 - HIGHEST), 1.0), float(size)) for size, density in pairs]

    total = sum(sizes) - pruned_count(sparsity, sum(sizes))
    low, high = -2.0, 2.0
    for _ in range(64):  # bisection, as far as float64 goes
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle)) < total else (low, middle)
    shares = kept(high)
    counts = [int(share) for share in shares]
    order = sorted(range(len(counts)), key=lambda place: counts[place] - shares[place])
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return {name: (size - count) / size for name, size, count in zip(layers, sizes, counts, strict=True)}


def slope(layers: Mapping[str, Layer], strength: float) -> Plan:
    """Linear over depth: the first block is denser than the mean by `strength`, the last one sparser."""
    last = max(layer.block for layer in layers.values())
    return {name: strength * (1 - 2 * layer.block / max(last, 1)) for name, layer in layers.items()}


def owl(layers: Mapping[str, Layer], outliers: Sequence[float]) -> Plan:
    """By the share of outliers in each block, see the module's docstring."""
    lowest, spread = min(outliers), (max(outliers) - min(outliers)) or 1.0
    return {name: 2 * RANGE * (outliers[layer.block] - lowest) / spread for name, layer in layers.items()}


def denser(layers: Mapping[str, Layer], part: str) -> Plan:
    """The layers of one part of every block, such as attention, denser by `PART`."""
    return {name: PART if layer.part == part else 0.0 for name, layer in layers.items()}


def added(*plans: Plan) -> Plan:
    """Several plans at once."""
    return {name: sum(plan[name] for plan in plans) for name in plans[0]}


def first_plans(allocation: str, layers: Mapping[str, Layer]) -> dict[str, Plan]:
    """The plans to try first, by name; the one that changes nothing comes first.

    Args:
        allocation: that of the settings.
        layers: of the model, by name.
    """
    plans = {UNIFORM: slope(layers, 0)} | _slopes({"slope": SLOPES[:1], "search": SLOPES}.get(allocation, ()), layers)
    if allocation == "search":
        plans |= _parts(layers)
    return plans


def second_plans(
    allocation: str, layers: Mapping[str, Layer], divergences: Mapping[str, float], outliers: Sequence[float]
) -> dict[str, Plan]:
    """The plans that depend on what the first ones have shown.

    Args:
        allocation: that of the settings.
        layers: of the model, by name.
        divergences: of the first plans, by name.
        outliers: of each block.
    """
    if allocation == "slope":
        return {}
    plans = {"owl": owl(layers, outliers)}
    if allocation == "search":
        best = [min((UNIFORM, *some), key=divergences.__getitem__) for some in (_slopes(SLOPES, layers), _parts(layers))]
        if UNIFORM not in best:
            first = first_plans(allocation, layers)
            plans[", ".join(best)] = added(*(first[name] for name in best))
    return plans


def _slopes(strengths: Sequence[float], layers: Mapping[str, Layer]) -> dict[str, Plan]:
    """The slopes to try, by name."""
    return {f"slope {strength:+g}": slope(layers, strength) for strength in strengths}


def _parts(layers: Mapping[str, Layer]) -> dict[str, Plan]:
    """The parts of blocks to try, by name."""
    return {f"{part} {PART:+g}": denser(layers, part) for part in sorted({layer.part for layer in layers.values()})}
