"""Least squares for the weights that are kept: preconditioned conjugate gradients, all rows at once.

With the mask M fixed, each row w of a layer has a problem of its own,

    minimize f(w) = ½ w H wᵀ − g wᵀ over the kept weights,

where H is the layer's Hessian and g a row of G = W₀H, for the dense weights W₀: then f is ½ (w − w₀) H (w − w₀)ᵀ up to a
constant, the error of the layer's output. For another target output, G is the product of target and input, scaled as H is.

The rows are independent, but all of them need a product with H, which is one matrix product for the whole layer: an iteration
takes 2 · out · in² operations. The preconditioner is H's diagonal (Jacobi), with which the scale of the inputs has no effect on
the result. Meng et al. 2024 (ALPS, section 3.3) solve for the weights in the same way.

Conjugate gradients lower f in every iteration, until rounding prevails; a row that ended above its start is put back.
"""

import torch
from torch import Tensor


@torch.no_grad()
def refit(
    weight: Tensor, mask: Tensor, hessian: Tensor, target: Tensor, *, iterations: int = 20, tolerance: float = 1e-4
) -> Tensor:
    """Lower the error of a pruned layer by changing the weights that are kept.

    Args:
        weight: where to start from, [out, in].
        mask: bool [out, in], True = kept.
        hessian: float32 [in, in].
        target: G, float32 [out, in]; `dense @ hessian` for the dense layer's output.
        iterations: at most.
        tolerance: a row is done when its gradient has shrunk to this fraction of what it was at the start.

    Returns:
        float32 [out, in], zero outside the mask; no row has a larger error than at the start.
    """
    start = weight.detach().float() * mask
    diagonal = hessian.diagonal()
    preconditioner = torch.where(diagonal > 0, 1 / diagonal, 0)  # [in]
    descent = target - start @ hessian  # −∇f, also of what is removed
    found, residual = start.clone(), descent * mask
    direction = residual * preconditioner
    size = (residual * direction).sum(1, keepdim=True)  # [out, 1]
    enough = max(tolerance, torch.finfo(torch.float32).eps) ** 2 * size  # below that, only rounding is left
    going = torch.ones_like(size, dtype=torch.bool)
    for _ in range(iterations):
        product = (direction @ hessian).mul_(mask)
        curvature = (direction * product).sum(1, keepdim=True)
        going &= (size > enough) & (curvature > 0)
        if not going.any():
            break
        step = torch.where(going, size / curvature, 0)
        found.addcmul_(direction, step)
        residual.addcmul_(product, step, value=-1)
        conditioned = torch.mul(residual, preconditioner, out=product)
        smaller = (residual * conditioned).sum(1, keepdim=True)
        direction.mul_(torch.where(going, smaller / size, 0)).add_(conditioned)
        size = smaller
    return torch.where(lowered(start, found, descent, hessian), found, start)


def lowered(start: Tensor, found: Tensor, descent: Tensor, hessian: Tensor) -> Tensor:
    """Whether a row's error has not become larger, bool [out, 1].

    Args:
        start: weights [out, in].
        found: weights [out, in].
        descent: G − WH at the start, [out, in].
        hessian: float32 [in, in].
    """
    change = found - start
    # f(found) − f(start), without the difference of two large numbers
    rise = (change * ((change @ hessian).div_(2) - descent)).sum(1, keepdim=True)
    return rise <= 0
