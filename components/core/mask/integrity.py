"""The invariant: every weight outside the mask is exactly zero, and the mask has the sparsity that was asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from components.core.mask.mask import Mask


class SparsityError(ValueError):
    """A weight outside the mask is not zero, or the mask does not have the sparsity that was asked for."""


def integrity(
    weights: Mapping[str, Tensor], mask: Mask, eps: float = 0.0, places: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Check the invariant: every weight outside the mask is zero and the mask has the sparsity asked for.

    Args:
        weights: name → weight, or its quantized data, [*shape of the mask].
        mask: decides which weights must be zero.
        eps: magnitudes up to this count as zero.
        places: name → which weights are stored at all, bool, of a format that stores those of the mask alone.

    Returns:
        `passed`, `sparsity` (of the mask), `violations` (number of weights outside the mask that exceed eps or are not
        finite), `max_abs` (the largest of them), `eps`, and `tensors` (name → what is wrong with it, for each faulty
        tensor; a kept weight that is not finite is a fault too, and so is a place that is stored though it is not kept, or
        kept though it is not stored).
    """
    tensors: dict[str, dict[str, Any]] = {}
    violations, largest = 0, 0.0
    for name, kept in mask.tensors.items():
        outside = weights[name].detach()[~kept.to(weights[name].device)].float().abs()
        wrong = outside[~(outside <= eps)]  # NaN is wrong too
        if wrong.numel():
            size = float(wrong.nan_to_num(nan=float(torch.finfo().max), posinf=float(torch.finfo().max)).max())
            tensors[name] = {"violations": wrong.numel(), "max_abs": size}
            violations, largest = violations + wrong.numel(), max(largest, size)
        broken = weights[name].numel() - int(torch.isfinite(weights[name].detach().float()).sum())
        if broken:
            tensors.setdefault(name, {})["not_finite"] = broken
        if places and name in places:
            there = places[name].to(kept.device)
            if not torch.equal(there, kept):
                counts = {"stored_outside": int((there & ~kept).sum()), "not_stored": int((kept & ~there).sum())}
                tensors.setdefault(name, {}).update(counts)
        expected = mask.requested_count(name)
        pruned = kept.numel() - int(kept.sum())
        if expected is not None and pruned != expected:
            tensors.setdefault(name, {}).update({"pruned": pruned, "asked_for": expected})
    return {
        "passed": not tensors,
        "sparsity": mask.realised_sparsity(),
        "violations": violations,
        "max_abs": largest,
        "eps": eps,
        "tensors": tensors,
    }


def combined(results: Sequence[dict[str, Any]], sparsity: float) -> dict[str, Any]:
    """The result for a whole model, from those of its parts.

    Args:
        results: at least one.
        sparsity: of the whole mask.
    """
    tensors = {name: found for result in results for name, found in result["tensors"].items()}
    return {
        "passed": not tensors,
        "sparsity": sparsity,
        "violations": sum(result["violations"] for result in results),
        "max_abs": max(result["max_abs"] for result in results),
        "eps": results[0]["eps"],
        "tensors": tensors,
    }


def enforce(result: dict[str, Any]) -> None:
    """Raise `SparsityError` if an `integrity` result failed, with the number and size of violations and the worst tensor."""
    if result["passed"]:
        return
    name, found = max(result["tensors"].items(), key=lambda entry: entry[1].get("violations", 0))
    raise SparsityError(
        f"the model must be finite, and zero outside its mask: {result['violations']} weights are not "
        f"(largest {result['max_abs']:.3g}), "
        f"in {len(result['tensors'])} tensors, the worst being {name}: {found}"
    )
