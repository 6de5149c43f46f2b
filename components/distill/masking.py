"""Training under a mask: which parameters train, and how zeros stay exactly zero.

With gradients masked from the first step, Adam's moments of a pruned weight stay 0, and decoupled weight decay of 0 is 0;
re-masking after the step is then an assertion, kept all the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from components.core.mask import Mask


def train_only_masked(model: nn.Module, mask: Mask) -> dict[str, nn.Parameter]:
    """Freeze all but the masked tensors; returns name → parameter of those that train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in mask.tensors)
    return {name: parameter for name, parameter in model.named_parameters() if name in mask.tensors}


def mask_on_device(mask: Mask, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name → bool tensor, True = pruned, beside each parameter."""
    return {name: ~mask.tensors[name].to(parameter.device) for name, parameter in parameters.items()}


@torch.no_grad()
def mask_gradients(parameters: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Set gradients of pruned weights to zero, in place."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.masked_fill_(pruned[name], 0)


@torch.no_grad()
def mask_weights(parameters: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Set pruned weights to zero, in place."""
    for name, parameter in parameters.items():
        parameter.masked_fill_(pruned[name], 0)
