"""Hessians of a block's linear layers, accumulated while calibration text runs through the block."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.processes import add_up, from_all, process_count, rank, together
from components.core.walk.stream import Batch, run_block

PIECE = 256  # columns


class AllSeenError(Exception):
    """Every layer has been called, so what the block does after it is not needed."""


@dataclass(frozen=True)
class Observed:
    """What a block's linear layers have seen.

    Layers that receive the same tensor object (q, k, v; gate, up) are led by the first of them, and have one entry for all.

    Attributes:
        leader: linear → the linear that leads it; those that saw nothing have none.
        tokens: leader → number of tokens.
        sums: leader → Σ xᵀx over these tokens, float32 [in, in], of which what `mirror` makes is left out.
    """

    leader: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Linear layers with the same inputs.

    Attributes:
        names: the layers.
        process: the number of the process that prunes them.
        hessian: float32 [in, in], that of each layer's squared output error; only in that process.
    """

    names: list[str]
    process: int
    hessian: Tensor | None


@torch.no_grad()
def observe(block: nn.Module, batches: Iterable[Batch]) -> Observed:
    """Run this process's text through a block, and add up what its linear layers see.

    Raises:
        ValueError: layers have the same input in one batch, and not in another.
    """
    seen = Observed()
    inputs: list[tuple[str, Tensor]] = []  # current forward pass: (leader, its input), kept alive to compare identity
    called: list[str] = []  # current forward pass: linears in the order of their calls
    layers = linears(block)
    may_stop = False

    def hook(name: str) -> Any:
        def accumulate(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            shared = next((other for other, tensor in inputs if tensor is x), None)
            leader = seen.leader.setdefault(name, shared or name)
            if leader == name:
                inputs.append((name, x))
                rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, in_features]
                if name not in seen.sums:
                    seen.sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
                add_products(seen.sums[name], rows)
                seen.tokens[name] = seen.tokens.get(name, 0) + rows.shape[0]
            elif shared != leader:
                raise ValueError(f"dense_model must give {name} the same input as {leader} in every batch")
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
    return seen


def hessians(block: nn.Module, seen: Observed, what: str) -> list[Group]:
    """A block's linear layers by their inputs, with the Hessians of those that this process prunes; all processes call this.

    H = 2/n · Σ xᵀx over the calibration tokens of all processes (SparseGPT, eq. 1).

    Args:
        block: the block.
        seen: what its layers have seen in this process.
        what: the block's name, for messages.

    Raises:
        ValueError: a layer saw no tokens (an expert that none were routed to), layers have the same input in one process and
            not in another, or a Hessian is not finite.
    """
    layers, everywhere = linears(block), from_all((seen.leader, seen.tokens))
    tokens = Counter[str]()
    led: dict[str, list[str]] = {}
    with together():
        for _, counts in everywhere:
            tokens.update(counts)
        for name in layers:
            leaders = {leader[name] for leader, _ in everywhere if name in leader}
            if not leaders:
                raise ValueError(
                    f"nsamples must be large enough for every layer to see a token, {what} {name} saw none; "
                    "if more do not help, dense_model never uses it and cannot be pruned"
                )
            if len(leaders) > 1:
                raise ValueError(f"dense_model must give {name} the same input as {' and '.join(leaders)} in every batch")
            led.setdefault(leaders.pop(), []).append(name)
    widths = {leader: (layers[leader].in_features, sum(layers[name].out_features for name in led[leader])) for leader in led}
    # a factorisation of the Hessian, and a pass over the weights in which each column changes all later ones
    processes = divide([width**3 + width**2 * out for width, out in widths.values()], process_count())
    groups = []
    for (leader, names), process in zip(led.items(), processes, strict=True):
        width, _ = widths[leader]
        total = seen.sums.pop(leader, None)
        if total is None:  # tokens were routed there in other processes only
            total = torch.zeros(width, width, device=layers[leader].weight.device)
        add_up(total, process)
        groups.append(Group(names, process, total if process == rank() else None))
    with together():
        for leader, group in zip(led, groups, strict=True):
            if group.hessian is not None:
                mirror(group.hessian)
                group.hessian.mul_(2 / tokens[leader])
                if not torch.isfinite(group.hessian).all():
                    raise ValueError(
                        f"dtype must hold the activations: the Hessian of {what} {leader} is not finite; try bfloat16"
                    )
    return groups


def divide(costs: Sequence[int], processes: int) -> list[int]:
    """Which process does each piece of work: the largest first, each by the process with the least to do (Graham, 1969)."""
    loads = [0] * processes
    chosen = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
        chosen[piece] = loads.index(min(loads))
        loads[chosen[piece]] += costs[piece]
    return chosen


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add xᵀx of the rows [tokens, width] to a sum [width, width], of which what `mirror` makes is left out."""
    for start in range(0, len(total), PIECE):
        total[start : start + PIECE, start:].addmm_(rows[:, start : start + PIECE].T, rows[:, start:])


def mirror(total: Tensor) -> None:
    """Complete a symmetric matrix, in place."""
    for start in range(0, len(total), PIECE):
        end = start + PIECE
        total[end:, start:end] = total[start:end, end:].T
