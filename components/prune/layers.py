"""Prune linear layers that have the same inputs: by the method that is chosen, and then by what makes its result better."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from components.core.checks import parse_pattern
from components.prune.alps import alps
from components.prune.conditioning import Factor, inverse_factor
from components.prune.config import PruneSettings
from components.prune.magnitude import magnitude
from components.prune.recipe import recipe_of
from components.prune.refit import refit
from components.prune.sparsegpt import sparsegpt
from components.prune.swaps import swap
from components.prune.wanda import wanda


@dataclass(frozen=True)
class Pruned:
    """A pruned layer.

    Attributes:
        weight: float32 [out, in], zero where it is not kept.
        mask: bool [out, in], True = kept.
        measured: what is known of it, by name: `relative_error`, that of its output on the calibration text; the same before
            swaps and refit, `relative_error_of_method`; the `damping` that the Hessian took, a lower bound of its `condition`,
            and how many `dead_inputs` it has, which are always zero.
    """

    weight: Tensor
    mask: Tensor
    measured: dict[str, Any]


@torch.no_grad()
def prune_layers(
    weights: list[Tensor],
    hessian: Tensor,
    sparsities: list[float],
    config: PruneSettings,
    what: str,
    cross: Tensor | None = None,
) -> list[Pruned]:
    """Prune linear layers that have the same inputs.

    Args:
        weights: [out, in] each.
        hessian: float32 [in, in], from their inputs x: 2/n · Σ xᵀx.
        sparsities: fraction of weights to remove from each layer, in [0, 1).
        config: the stage's settings.
        what: the layers' names, for messages.
        cross: float32 [in, in], 2/n · Σ dᵀx for the inputs d of the same layers in the dense model, whose outputs are then what
            is to be reproduced; None = the outputs of the dense weights for x.

    Raises:
        ValueError: see `inverse_factor`.
    """
    recipe, n_of_m = recipe_of(config), parse_pattern(config.pattern)
    factor = inverse_factor(hessian, config.damping, what)
    if cross is not None:
        weights = [best_weight(weight, hessian, cross, factor) for weight in weights]
    methods: dict[str, Callable[..., list[tuple[Tensor, Tensor]]]] = {
        "sparsegpt": partial(sparsegpt, factor=factor, block_size=config.block_size),
        "alps": partial(alps, factor=factor),
        "wanda": partial(wanda, hessian=hessian),
        "magnitude": magnitude,
    }
    found = methods[recipe.method](weights, sparsities=sparsities, n_of_m=n_of_m)
    pruned = []
    for dense, (weight, mask) in zip(weights, found, strict=True):
        first = relative_error(dense, weight, hessian)
        target = dense.float() @ factor.damped  # undamped, what follows would fit the noise of few tokens
        if recipe.swaps:
            weight, mask = swap(weight, mask, factor.damped, target, n_of_m, rounds=recipe.swaps)
        if recipe.refit:
            weight = refit(weight, mask, factor.damped, target, iterations=recipe.refit)
        measured = {
            "relative_error": relative_error(dense, weight, hessian),
            "relative_error_of_method": first,
            "damping": factor.damping,
            "condition": factor.condition,
            "dead_inputs": int(factor.dead.sum()),
        }
        pruned.append(Pruned(weight, mask, measured))
    return pruned


def best_weight(weight: Tensor, hessian: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """The dense weight that does best on other inputs: argmin over Ŵ of ‖WD − ŴX‖², damped towards W.

    With H = XXᵀ and C = DXᵀ it is W + W(C − H)(H + λD)⁻¹.

    Args:
        weight: W, [out, in].
        hessian: H, float32 [in, in].
        cross: C, float32 [in, in], scaled as H is.
        factor: that of the damped Hessian.
    """
    dense = weight.float()
    moved = (dense @ (cross - hessian)).masked_fill_(factor.dead, 0)
    found: Tensor = dense + moved @ factor.upper.T @ factor.upper
    return found


def relative_error(dense: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """‖WX − ŴX‖² / ‖WX‖², computed from the Hessian XXᵀ [in, in]; weights [out, in]."""
    dense = dense.float()
    change = sparse - dense
    moved = torch.einsum("oi,oi->", change @ hessian, change)
    whole = torch.einsum("oi,oi->", dense @ hessian, dense)
    return float(moved.clamp_min(0) / whole.clamp_min(torch.finfo(torch.float32).tiny))  # rounding may make it negative


@torch.no_grad()
def prune_idle(weights: list[Tensor], sparsities: list[float], config: PruneSettings) -> list[Pruned]:
    """Prune matrices [out, in] that have seen too few tokens for a Hessian: by magnitude, which their record says."""
    found = magnitude(weights, sparsities, parse_pattern(config.pattern))
    return [Pruned(weight, mask, {"fallback": "magnitude"}) for weight, mask in found]
