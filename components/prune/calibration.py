"""Hessians of a block's linear layers, accumulated while calibration text runs through the block."""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.core.blocks import linears
from components.core.processes import add_up, from_all, process_count, rank, together
from components.core.walk.stream import Batch, run_block

PIECE = 256  # columns


class AllSeenError(Exception):
    """Every layer that is observed has been called, so what the block does after it is not needed."""


@dataclass(frozen=True)
class Observed:
    """What a block's linear layers have seen.

    Layers that receive the same tensor object (q, k, v; gate, up) are led by the first of them, and have one entry for all.

    Attributes:
        names: the layers that are observed.
        leader: linear → the linear that leads it; those that saw nothing have none.
        tokens: leader → number of tokens.
        sums: leader → Σ xᵀx over these tokens, float32 [in, in], of which what `mirror` makes is left out.
        cross: leader → Σ dᵀx, float32 [in, in], for the inputs d of the layer in the dense model, if they are observed too.
    """

    names: Collection[str]
    leader: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Linear layers with the same inputs.

    Attributes:
        names: the layers.
        process: the number of the process that prunes them.
        hessian: float32 [in, in], that of each layer's squared output error; only in that process.
        cross: float32 [in, in], see `Observed`, scaled as the Hessian is; None if it is not observed.
    """

    names: list[str]
    process: int
    hessian: Tensor | None
    cross: Tensor | None


Call = tuple[str, Tensor]  # a linear layer's name, and its input [batch, seq_len, in] or [tokens, in]


def in_order(block: nn.Module, batches: Iterable[Batch]) -> list[list[str]]:
    """A block's linear layers in steps, each of which has those that do not depend on each other; all processes call this.

    Layers with the same input are in one step, and so are those whose names differ in a number alone, as in the experts of a
    mixture. The steps are in the order of the calls in the first batch; layers that it does not call come last.
    """
    layers = linears(block)
    calls = calls_of(block, layers, next(iter(batches)), may_stop=False)
    kinds = [sorted({_kind(other) for other, tensor in calls if tensor is x}) for _, x in calls]
    steps: list[list[str]] = []
    for kind in (*from_all(kinds)[0], sorted({_kind(name) for name in layers})):
        done = {name for step in steps for name in step}
        if step := [name for name in layers if _kind(name) in kind and name not in done]:
            steps.append(step)
    return steps


def _kind(name: str) -> str:
    """A layer's name without its numbers."""
    return re.sub(r"\d+", "*", name)


@torch.no_grad()
def calls_of(block: nn.Module, names: Collection[str], batch: Batch, may_stop: bool) -> list[Call]:
    """Run a block, and return the calls of some of its linear layers in their order.

    Args:
        block: the block.
        names: the layers.
        batch: what goes into the block.
        may_stop: whether to end when all have been called.
    """
    calls: list[Call] = []

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls.append((name, args[0]))
            if may_stop and len(calls) == len(names):
                raise AllSeenError

        return keep

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears(block).items() if name in names]
    try:
        with contextlib.suppress(AllSeenError):
            run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def observe(
    block: nn.Module,
    batches: Iterable[Batch],
    names: Collection[str] | None = None,
    dense: tuple[nn.Module, Iterable[Batch]] | None = None,
) -> Observed:
    """Run this process's text through a block, and add up what its linear layers see.

    Args:
        block: the block.
        batches: what goes into the block.
        names: the layers to observe; None = all.
        dense: the dense block and what goes into it, batch for batch the same text.

    Raises:
        ValueError: layers have the same input in one batch, and not in another, or see other tokens than in the dense model.
    """
    names = linears(block).keys() if names is None else names
    seen, may_stop = Observed(names), False
    others: Iterable[Batch | None] = dense[1] if dense else itertools.repeat(None)
    for batch, other in zip(batches, others):  # noqa: B905 (the one that repeats has no end)
        calls = calls_of(block, names, batch, may_stop)
        wanted = calls_of(dense[0], names, other, may_stop) if dense and other else []
        if wanted and [(name, x.shape) for name, x in calls] != [(name, x.shape) for name, x in wanted]:
            raise ValueError("target must be pruned for a model that routes its tokens, got dense: layers see other tokens")
        inputs: list[Call] = []  # of the leaders
        for number, (name, x) in enumerate(calls):
            shared = next((other for other, tensor in inputs if tensor is x), None)
            leader = seen.leader.setdefault(name, shared or name)
            if leader == name:
                inputs.append((name, x))
                _add(seen, name, x, wanted[number][1] if wanted else None)
            elif shared != leader:
                raise ValueError(f"dense_model must give {name} the same input as {leader} in every batch")
        may_stop = len(calls) == len({name for name, _ in calls})
    return seen


def _add(seen: Observed, name: str, x: Tensor, dense: Tensor | None) -> None:
    """Add the inputs of one batch to what a leader has seen; `dense` has those of the dense model, if they are observed."""
    rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, in_features]
    if name not in seen.sums:
        seen.sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
    add_products(seen.sums[name], rows)
    seen.tokens[name] = seen.tokens.get(name, 0) + rows.shape[0]
    if dense is not None:
        seen.cross.setdefault(name, torch.zeros_like(seen.sums[name])).addmm_(dense.reshape(rows.shape).float().T, rows)


def hessians(block: nn.Module, seen: Observed, what: str) -> list[Group]:
    """Linear layers of a block by their inputs, with the Hessians of those that this process prunes; all processes call this.

    H = 2/n · Σ xᵀx over the calibration tokens of all processes (SparseGPT, eq. 1).

    Args:
        block: the block.
        seen: what its layers have seen in this process.
        what: the block's name, for messages.

    Raises:
        ValueError: a layer saw no tokens (an expert that none were routed to), layers have the same input in one process and
            not in another, or a Hessian is not finite.
    """
    layers = {name: layer for name, layer in linears(block).items() if name in seen.names}
    everywhere = from_all((seen.leader, seen.tokens, bool(seen.cross)))
    tokens = Counter[str]()
    led: dict[str, list[str]] = {}
    with together():
        for _, counts, _ in everywhere:
            tokens.update(counts)
        for name in layers:
            leaders = {leader[name] for leader, *_ in everywhere if name in leader}
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
        cross = None
        if any(crossed for *_, crossed in everywhere):
            cross = seen.cross.pop(leader, None)
            cross = torch.zeros_like(total) if cross is None else cross
            add_up(cross, process)
        groups.append(Group(names, process, *((total, cross) if process == rank() else (None, None))))
    with together():
        for leader, group in zip(led, groups, strict=True):
            if group.hessian is not None:
                mirror(group.hessian)
                group.hessian.mul_(2 / tokens[leader])
                if group.cross is not None:
                    group.cross.mul_(2 / tokens[leader])
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
