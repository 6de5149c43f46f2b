"""Hessians of a block's matrices, accumulated while calibration text runs through the block."""

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from components.core.blocks import matrices, weights_of
from components.core.device import factors_in
from components.core.processes import add_up, from_all, process_count, rank, together
from components.core.walk.stream import Batch, run_block

PIECE = 256  # columns
# how models multiply their inputs by a matrix → the places of these two among the arguments
PRODUCTS = {functional.linear: (0, 1), torch.addmm: (1, 2), torch.matmul: (0, 1), Tensor.matmul: (0, 1)}


Call = tuple[str, Tensor]  # a matrix's name, and its input [batch, seq_len, in] or [tokens, in]


class AllSeenError(Exception):
    """Every matrix that is observed has been used, so what the block does after it is not needed."""


class Products(TorchFunctionMode):
    """Notices the products with some matrices, while it is entered.

    So all kinds are seen alike: those of an `nn.Linear`, of a Conv1D, and of an expert of a mixture, whose matrix is a part of
    a parameter, and which is given the tokens that are routed to it.

    Args:
        block: the block that has the matrices.
        names: which of them.
        may_stop: whether to end, by `AllSeenError`, when each has been used.
    """

    def __init__(self, block: nn.Module, names: Collection[str], may_stop: bool) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.may_stop = may_stop
        found = matrices(block)
        self.names = {
            place_of(matrix.of(block.get_parameter(matrix.parameter))): name for name, matrix in found.items() if name in names
        }

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for each function of torch: remember a product, before it is computed."""
        if function in PRODUCTS and len(args) > max(PRODUCTS[function]):
            x, weight = (args[place] for place in PRODUCTS[function])
            name = self.names.get(place_of(weight))
            if name is not None:
                self.calls.append((name, x))
                if self.may_stop and len(self.calls) == len(self.names):
                    raise AllSeenError
        return function(*args, **(kwargs or {}))


def place_of(weight: Tensor) -> tuple[int, int]:
    """What tells a matrix from others, if it is the same view or another: its parameter, and where it begins in that."""
    parameter = weight if weight._base is None else weight._base
    return id(parameter), int(weight.storage_offset())


@dataclass(frozen=True)
class Observed:
    """What a block's matrices have seen.

    Matrices that receive the same tensor object (q, k, v; gate, up) are led by the first of them, and have one entry for all.

    Attributes:
        names: the matrices that are observed.
        leader: matrix → the one that leads it; those that saw nothing have none.
        tokens: leader → number of tokens.
        sums: leader → Σ xᵀx over these tokens, float32 [in, in], of which what `mirror` makes is left out.
        cross: leader → Σ dᵀx, float32 [in, in], for the inputs d of the matrix in the dense model, if they are observed too.
    """

    names: Collection[str]
    leader: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Matrices with the same inputs.

    Attributes:
        names: of the matrices.
        process: the number of the process that prunes them.
        tokens: how many they have seen.
        hessian: float32 [in, in], that of each matrix's squared output error; only in that process, and of enough tokens.
        cross: float32 [in, in], see `Observed`, scaled as the Hessian is; None if it is not observed.
    """

    names: list[str]
    process: int
    tokens: int
    hessian: Tensor | None
    cross: Tensor | None


def in_order(block: nn.Module, batches: Iterable[Batch], names: Collection[str]) -> list[list[str]]:
    """Some of a block's matrices in steps, each of which has those that do not depend on each other; all processes call this.

    Matrices with the same input are in one step, and so are those whose names differ in a number alone, as in the experts of a
    mixture. The steps are in the order of use in the first batch; matrices that it does not use come last.
    """
    calls = calls_of(block, names, next(iter(batches)), may_stop=False)
    kinds = [sorted({_kind(other) for other, tensor in calls if tensor is x}) for _, x in calls]
    steps: list[list[str]] = []
    for kind in (*from_all(kinds)[0], sorted({_kind(name) for name in names})):
        done = {name for step in steps for name in step}
        if step := [name for name in names if _kind(name) in kind and name not in done]:
            steps.append(step)
    return steps


def _kind(name: str) -> str:
    """A layer's name without its numbers."""
    return re.sub(r"\d+", "*", name)


@torch.no_grad()
def calls_of(block: nn.Module, names: Collection[str], batch: Batch, may_stop: bool) -> list[Call]:
    """Run a block, and return the products with some of its matrices in their order.

    Args:
        block: the block.
        names: the matrices.
        batch: what goes into the block.
        may_stop: whether to end when all have been used.
    """
    with contextlib.suppress(AllSeenError), Products(block, names, may_stop) as products:
        run_block(block, batch)
    calls: list[Call] = products.calls
    return calls


@torch.no_grad()
def observe(
    block: nn.Module,
    batches: Iterable[Batch],
    names: Collection[str] | None = None,
    dense: tuple[nn.Module, Iterable[Batch]] | None = None,
) -> Observed:
    """Run this process's text through a block, and add up what its matrices see.

    Args:
        block: the block.
        batches: what goes into the block.
        names: the matrices to observe; None = all.
        dense: the dense block and what goes into it, batch for batch the same text.

    Raises:
        ValueError: matrices have the same input in one batch, and not in another, or see other tokens than in the dense model.
    """
    names = matrices(block).keys() if names is None else names
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
                with factors_in(batch.autocast):  # which is what the matrix itself makes of them
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


def hessians(block: nn.Module, seen: Observed, what: str, fewest: int = 1, *, refuses: bool = True) -> list[Group]:
    """Matrices of a block by their inputs, with the Hessians of those that this process prunes; all processes call this.

    H = 2/n · Σ xᵀx over the calibration tokens of all processes (SparseGPT, eq. 1).

    Args:
        block: the block.
        seen: what its matrices have seen in this process.
        what: the block's name, for messages.
        fewest: calibration tokens of which the Hessian of an expert is made; that of another matrix takes one.
        refuses: whether a matrix that has seen fewer is an error; otherwise its group has no Hessian in any process.

    Raises:
        ValueError: a matrix saw too few tokens (an expert that few were routed to), matrices have the same input in one process
            and not in another, or activations are not finite.
    """
    found = matrices(block)
    weights = {name: weight for name, weight in weights_of(block).items() if name in seen.names}
    needed = {name: 1 if found[name].expert is None else fewest for name in weights}
    everywhere = from_all((seen.leader, seen.tokens, bool(seen.cross)))
    tokens = Counter[str]()
    led: dict[str, list[str]] = {}
    with together():
        for name, products in seen.sums.items():  # in the order of the calls, so that the one where it began is named
            if not all(bool(torch.isfinite(each).all()) for each in (products, seen.cross.get(name, products))):
                raise ValueError(f"dtype must hold the activations: the Hessian of {what}.{name} is not finite; try bfloat16")
        for _, counts, _ in everywhere:
            tokens.update(counts)
        for name in weights:
            leaders = {leader[name] for leader, *_ in everywhere if name in leader} or {name}
            if len(leaders) > 1:
                raise ValueError(f"dense_model must give {name} the same input as {' and '.join(leaders)} in every batch")
            leader = leaders.pop()
            if refuses and tokens[leader] < needed[name]:
                raise ValueError(
                    f"nsamples must be large enough for {what}.{name} to see at least {needed[name]} of the tokens, "
                    f"it saw {tokens[leader]}; with idle_experts magnitude it is pruned without"
                )
            led.setdefault(leader, []).append(name)
    widths = {leader: (weights[leader].shape[1], sum(len(weights[name]) for name in led[leader])) for leader in led}
    # a factorisation of the Hessian, and a pass over the weights in which each column changes all later ones
    processes = divide([width**3 + width**2 * out for width, out in widths.values()], process_count())
    groups = []
    for (leader, names), process in zip(led.items(), processes, strict=True):
        width, _ = widths[leader]
        if tokens[leader] < needed[leader]:
            groups.append(Group(names, process, tokens[leader], None, None))
            continue
        total = seen.sums.pop(leader, None)
        if total is None:  # tokens were routed there in other processes only
            total = torch.zeros(width, width, device=weights[leader].device)
        add_up(total, process)
        cross = None
        if any(crossed for *_, crossed in everywhere):
            cross = seen.cross.pop(leader, None)
            cross = torch.zeros_like(total) if cross is None else cross
            add_up(cross, process)
        groups.append(Group(names, process, tokens[leader], *((total, cross) if process == rank() else (None, None))))
    with together():
        for leader, group in zip(led, groups, strict=True):
            if group.hessian is not None:
                mirror(group.hessian)
                group.hessian.mul_(2 / tokens[leader])
                if group.cross is not None:
                    group.cross.mul_(2 / tokens[leader])
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
