"""Blocks of tokens on their way through a decoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from components.core.perplexity import TOKENS_PER_FORWARD
from components.core.walk.activations import Activations

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides the hidden states


@dataclass(frozen=True)
class Batch:
    """Some rows of a text, before one block.

    Attributes:
        rows: which blocks of tokens.
        hidden: the block's input, [len(rows), seq_len, width].
        call: the block's other arguments.
        autocast: number format in which the block multiplies them, whatever that of its weights; None = that one.
    """

    rows: range
    hidden: Tensor
    call: Call
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Stream:
    """Blocks of tokens on their way through the decoder.

    Attributes:
        ids: the tokens [rows, seq_len].
        rows: the rows that go through a block together, as a batch.
        calls: for each batch, what each block is called with.
        files: two files of hidden states; a block reads from the one and writes to the other.
        autocast: see `Batch`.
    """

    ids: Tensor
    rows: list[range]
    calls: list[list[Call]]
    files: tuple[Activations, Activations]
    autocast: torch.dtype | None = None

    def batches(self, index: int, device: torch.device) -> Iterator[Batch]:
        """The input of block `index`, batch by batch."""
        for rows, calls in zip(self.rows, self.calls, strict=True):
            call = calls[index] if index < len(calls) else ((), {})  # there is none after the last block
            yield Batch(rows, self.before(index).read(rows, device), call, self.autocast)

    def before(self, index: int) -> Activations:
        """Hidden states before block `index`."""
        return self.files[index % 2]


def batches_of(ids: Tensor, tokens: int | None = None) -> list[range]:
    """Token blocks [rows, seq_len] in batches of as many rows as have so many tokens, `TOKENS_PER_FORWARD` if it is None."""
    size = max(1, (tokens or TOKENS_PER_FORWARD) // ids.shape[1])
    return [range(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]


def run_block(block: nn.Module, batch: Batch) -> Tensor:
    """Hidden states [len(rows), seq_len, width] that a block gives for a batch."""
    more, named = batch.call
    with torch.autocast(batch.hidden.device.type, batch.autocast, enabled=batch.autocast is not None):
        return first_of(block(batch.hidden, *more, **named)).to(batch.hidden.dtype)


def check_finite(hidden: Tensor, block: nn.Module, batch: Batch, name: str) -> None:
    """Check the hidden states that the block `name` has given for a batch.

    Raises:
        ValueError: they are not finite; the message names the module of the block whose output was the first that is not.
    """
    if torch.isfinite(hidden).all():
        return
    faulty: list[str] = []

    def look(_: nn.Module, __: Any, output: Any, inner: str) -> None:
        if not all(torch.isfinite(part).all() for part in tree_leaves(output) if isinstance(part, Tensor)):
            faulty.append(f"{name}.{inner}".rstrip("."))

    handles = [module.register_forward_hook(partial(look, inner=inner)) for inner, module in block.named_modules()]
    try:
        run_block(block, batch)
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"dtype must hold the activations: the output of {[*faulty, name][0]} is not finite; try bfloat16")


def first_of(output: Any) -> Tensor:
    """The hidden states in what a block returned."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def share(value: Any, reference: Any) -> Any:
    """`value`, reusing the tensors of `reference` wherever they are equal, so that only one copy is kept."""
    if isinstance(value, Tensor):
        same = isinstance(reference, Tensor) and value.shape == reference.shape and torch.equal(value, reference)
        return reference if same else value
    if isinstance(value, tuple) and isinstance(reference, tuple) and len(value) == len(reference):
        return tuple(share(*pair) for pair in zip(value, reference, strict=True))
    if isinstance(value, dict) and isinstance(reference, dict):
        return {key: share(item, reference.get(key)) for key, item in value.items()}
    return value
