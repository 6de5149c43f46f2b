"""The learning rate schedule of a run, and Adam's betas and moments."""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

BETAS = (0.9, 0.95)  # the usual pair for language models: a shorter memory than AdamW's default, for short runs


def cosine_with_warmup(step: int, warmup: int, total: int) -> float:
    """Fraction of the peak learning rate at `step` (from 0): a linear rise over `warmup` steps, then half a cosine to 0.

    Unlike the usual schedule in transformers, no step has rate 0, since a short run cannot afford to waste a step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def make_schedule(optimizer: Optimizer, warmup_ratio: float, total_steps: int) -> LambdaLR:
    """The schedule of a run with `total_steps` steps."""
    warmup = round(warmup_ratio * total_steps)
    return LambdaLR(optimizer, lambda step: cosine_with_warmup(step, warmup, total_steps))


def restore_schedule(optimizer: Optimizer, schedule: LambdaLR, steps: int) -> None:
    """Advance a fresh schedule to where it was after `steps` steps."""
    schedule.last_epoch = steps
    rates = [rate * share(steps) for rate, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def moments(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Adam's state of a parameter: step, exp_avg and exp_avg_sq. It is created if there has been no step yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)  # on the device where fused AdamW needs it
        state |= {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
    return state
