"""Hessians of a block's linear layers, accumulated while calibration text runs through the block."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.walk.stream import Batch, run_block


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

    def hook(name: str) -> Any:
        def accumulate(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            shared = next((other for other, tensor in inputs if tensor is x), None)
            if name not in leader:
                leader[name] = shared or name
            if leader[name] != name:
                if shared != leader[name]:
                    raise ValueError(f"dense_model must give {name} the same input as {leader[name]} in every batch")
                return
            inputs.append((name, x))
            rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, in_features]
            if name not in sums:
                sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            sums[name].addmm_(rows.T, rows)
            counts[name] = counts.get(name, 0) + rows.shape[0]

        return accumulate

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears(block).items()]
    try:
        for batch in batches:
            inputs.clear()
            run_block(block, batch)
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
        total.mul_(2 / counts[name])
        if not torch.isfinite(total).all():
            raise ValueError(f"dtype must hold the activations: the Hessian of {what} {name} is not finite; try bfloat16")
    return {name: sums[leader[name]] for name in linears(block)}
