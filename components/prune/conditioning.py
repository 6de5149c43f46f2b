"""The damped Hessian, factorized as long as rounding allows, and the Hessian scaled to a unit diagonal.

A Hessian is singular if inputs depend on each other or if there are fewer tokens than inputs, and float32 rounds its smallest
eigenvalues to anything. Damping lifts them. The amount is a fraction λ of the diagonal, in one of two ways:

    of its mean:   H + λ · mean(diag H) · I       (Frantar & Alistarh 2023)
    of each entry: H + λ · diag(H)                (Marquardt 1963)

Where a few tokens have activations a thousand times as large as all others ("attention sinks", Xiao et al. 2023; "massive
activations", Sun et al. 2024), the mean is theirs alone, and damping by it drowns every other input. Damping by each entry does
not depend on the scale of the inputs: with D = diag(H)^-½ and H' = D H D, whose diagonal is one, it is H' + λI, seen in the
original scale. Methods whose result depends on the scale, other than by damping, compute with H' and W' = W D^-1 instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.core.progress import log

# each with ten times the damping of the one before; float64 needs time and memory, so it comes last
ATTEMPTS = [(dtype, 10**power) for dtype in (torch.float32, torch.float64) for power in range(3)]


@dataclass(frozen=True)
class Factor:
    """A factorized Hessian.

    Attributes:
        upper: U, upper triangular, float32 [in, in], with UᵀU the inverse of the damped Hessian.
        dead: bool [in], True = an input that is always zero; its diagonal entry was taken as 1.
        damping: the fraction of the diagonal that it took.
        condition: a lower bound of the damped Hessian's condition number, (max U[j, j] / min U[j, j])².
    """

    upper: Tensor
    dead: Tensor
    damping: float
    condition: float


def inverse_factor(hessian: Tensor, damping: float, what: str, normalise: bool = False) -> Factor:
    """Upper Cholesky factor U of the inverse of the damped Hessian, H⁻¹ = UᵀU.

    Args:
        hessian: float32 [in, in].
        damping: fraction of the diagonal to add to the diagonal.
        what: the layer's name, for messages.
        normalise: add a fraction of each entry, not of the mean.

    Raises:
        ValueError: the Hessian is not positive definite even with the strongest damping tried.
    """
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    diagonal = hessian.diagonal() if normalise else hessian.diagonal().mean()
    for dtype, factor in ATTEMPTS:
        used = damping * factor
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(used * diagonal)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if failed or not torch.isfinite(upper).all():
            continue
        condition = float((upper.diagonal().max() / upper.diagonal().min()).square())
        if (dtype, factor) != ATTEMPTS[0]:
            taken = f"{used:g}" if dtype is torch.float32 else f"{used:g} and float64"
            needed = f"{what}: the Hessian needed damping {taken} instead of {damping:g}"
            log(f"{needed}; its condition is {condition:.0e} or worse", by_any=True)
        return Factor(upper.float(), dead, used, condition)
    raise ValueError(
        f"damping must make the Hessian positive definite, {used:g} did not for {what}: use more or other calibration text"
    )


def input_scales(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """How to normalise a Hessian: (diag(H)^½, diag(H)^-½), float32 [in] each; both are 0 for an input that is always zero."""
    scales = hessian.diagonal().clamp_min(0).sqrt()
    return scales, torch.where(scales > 0, 1 / scales, 0)
