"""Hessians of a block's linear layers, accumulated while calibration text runs through the block."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.walk.stream import Batch, run_block

PIECE = 256  # columns


class AllSeenError(Exception):
    """Every layer has been called, so what the block does after it is not needed."""


@torch.no_grad()
def hessians(block: nn.Module, batches: Iterable[Batch], what: str) -> dict[str, Tensor]:
    """Hessian of each linear layer's squared output error, H = 2/n · Σ xᵀx over calibration tokens (SparseGPT, eq. 1).

    Layers that receive the same tensor object (q, k, v; gate, up) share one Hessian, which is accumulated only once.

    Returns:
        name within the block → float32 [in_features, in_features].

    Raises:
        ValueError: a layer saw no tokens (an expert that none were routed to), or a Hessian is not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    leader: dict[str, str] = {}  # linear → the linear whose Hessian it shares
    inputs: list[tuple[str, Tensor]] = []  # current forward pass: (leader, its input), kept alive to compare identity
    called: list[str] = []  # current forward pass: linears in the order of their calls
    layers = linears(block)
    may_stop = False

    def hook(name: str) -> Any:
        def accumulate(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            shared = next((other for other, tensor in inputs if tensor is x), None)
            if name not in leader:
                leader[name] = shared or name
            if leader[name] == name:
                inputs.append((name, x))
                rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, in_features]
                if name not in sums:
                    sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
                add_products(sums[name], rows)
                counts[name] = counts.get(name, 0) + rows.shape[0]
            elif shared != leader[name]:
                raise ValueError(f"dense_model must give {name} the same input as {leader[name]} in every batch")
            called.append(name)
            if may_stop and len(called) == len(layers):
                raise AllSeenError

        return accumulate

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            inputs.clear()
            called.clear()
            with contextlib.suppress(AllSeenError):
                run_block(block, batch)
                may_stop = len(called) == len(set(called))
    finally:
        for handle in handles:
            handle.remove()
    for name in linears(block):
        if counts.get(leader.get(name, ""), 0) == 0:
            raise ValueError(
                f"nsamples must be large enough for every layer to see a token, {what} {name} saw none; "
                "if more do not help, dense_model never uses it and cannot be pruned"
            )
    for name, total in sums.items():
        mirror(total)
        total.mul_(2 / counts[name])
        if not torch.isfinite(total).all():
            raise ValueError(f"dtype must hold the activations: the Hessian of {what} {name} is not finite; try bfloat16")
    return {name: sums[leader[name]] for name in linears(block)}


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add xᵀx of the rows [tokens, width] to a sum [width, width], of which what `mirror` makes is left out."""
    for start in range(0, len(total), PIECE):
        total[start : start + PIECE, start:].addmm_(rows[:, start : start + PIECE].T, rows[:, start:])


def mirror(total: Tensor) -> None:
    """Complete a symmetric matrix, in place."""
    for start in range(0, len(total), PIECE):
        end = start + PIECE
        total[end:, start:end] = total[start:end, end:].T
