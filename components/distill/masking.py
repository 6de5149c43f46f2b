"""Training under a mask: which parameters train, and how pruned weights stay exactly zero.

With gradients masked from the first step, Adam's moments of a pruned weight stay 0, and decoupled weight decay leaves 0
unchanged. Masking the weights after each step is therefore redundant and serves only as a safeguard.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def mask_gradients(parameters: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Set the gradients of pruned weights to zero, in place; for sharded parameters, in the local part.

    Args:
        parameters: name → parameter.
        pruned: name → bool tensor of the local part's shape, True = pruned; of those parameters that have a fixed mask.
    """
    for name, gone in pruned.items():
        if (gradient := parameters[name].grad) is not None:
            local(gradient).masked_fill_(gone, 0)


@torch.no_grad()
def mask_weights(parameters: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Set pruned weights to zero, in place. Arguments as in `mask_gradients`."""
    for name, gone in pruned.items():
        local(parameters[name]).masked_fill_(gone, 0)
