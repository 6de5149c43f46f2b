"""The damped Hessian, factorized as long as rounding allows, and the Hessian scaled to a unit diagonal.

A Hessian is singular if inputs depend on each other or if there are fewer tokens than inputs, and float32 rounds its smallest
eigenvalues to anything. Damping lifts them. SparseGPT adds λ · mean(diag H) to the diagonal (Frantar & Alistarh 2023). But
where a few tokens have activations a thousand times as large as all others ("attention sinks", Xiao et al. 2023; "massive
activations", Sun et al. 2024), the mean is theirs alone, and damping by it drowns every other input. A fraction of each entry,
λ · diag(H) (Marquardt 1963), does not depend on the scale of the inputs; but then nothing keeps the weights of an input that
hardly varies from growing as it shrinks. They fit noise, and one such weight decides the step with which its row is rounded to
8 bits. So each entry counts for at least as much as the one in the middle, which no few inputs decide:

    H + λ · max(diag(H), median(diag H))

Methods whose result depends on the scale of the inputs, other than by damping, compute with D H D and W D^-1 instead, where D
scales the diagonal of the damped Hessian to one.
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
        damped: the damped Hessian, float32 [in, in].
        upper: U, upper triangular, float32 [in, in], with UᵀU its inverse.
        dead: bool [in], True = an input that is always zero, and so is the damped Hessian's entry; U was computed with 1 there.
        damping: the fraction of the diagonal that it took.
        condition: a lower bound of the damped Hessian's condition number, (max U[j, j] / min U[j, j])².
    """

    damped: Tensor
    upper: Tensor
    dead: Tensor
    damping: float
    condition: float


def inverse_factor(hessian: Tensor, damping: float, what: str) -> Factor:
    """Upper Cholesky factor U of the inverse of the damped Hessian, H⁻¹ = UᵀU.

    Args:
        hessian: float32 [in, in].
        damping: λ.
        what: the layer's name, for messages.

    Raises:
        ValueError: the Hessian is not positive definite even with the strongest damping tried.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    amounts = torch.where(dead, 0, diagonal.clamp_min(diagonal[~dead].quantile(0.5))) if not dead.all() else diagonal
    for dtype, factor in ATTEMPTS:
        used = damping * factor
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(amounts, alpha=used).masked_fill_(dead, 1)
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
        damped.diagonal().masked_fill_(dead, 0)
        return Factor(damped.float(), upper.float(), dead, used, condition)
    raise ValueError(
        f"damping must make the Hessian positive definite, {used:g} did not for {what}: use more or other calibration text"
    )


def input_scales(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """How to normalise a Hessian: (diag(H)^½, diag(H)^-½), float32 [in] each; both are 0 for an input that is always zero."""
    scales = hessian.diagonal().clamp_min(0).sqrt()
    return scales, torch.where(scales > 0, 1 / scales, 0)
