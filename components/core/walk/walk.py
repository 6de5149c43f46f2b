"""The walk: a decoder's blocks from the safetensors files, one at a time.

The model is made without its parameters. A block's are loaded when its turn comes and freed after it; what lies outside the
blocks (embeddings, the last norm, the head) is loaded at the beginning and at the end. Text goes through a block as hidden
states, a batch at a time; between two blocks they lie in files.

What a model passes its blocks besides hidden states (position embeddings, attention masks, which differ from block to block
in models that mix sliding windows and full attention) is recorded once, by running the model with its blocks skipped. That is
right only for blocks that depend on each other by nothing but the hidden states: `check` compares with the model's own results.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from components.core.blocks import find_blocks
from components.core.checkpoint.loading import open_model
from components.core.checkpoint.saving import parameters_outside
from components.core.checkpoint.weights import unload
from components.core.errors import one_line
from components.core.head import Head
from components.core.perplexity import decoder_and_head, differ, probe_ids, token_losses
from components.core.walk.activations import Activations
from components.core.walk.stream import Call, Stream, batches_of, check_finite, first_of, run_block, share


class ReplayError(ValueError):
    """A model's blocks cannot be run one by one."""


@contextlib.contextmanager
def replayable(parameter: str) -> Iterator[None]:
    """Turn what a model's code raises, if its blocks are not called as it expects, into a ReplayError.

    Raises:
        ReplayError: in place of any error but one of a file or of memory.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ReplayError(f"{parameter} must be a model whose blocks can be run one by one: {one_line(error)}") from error


class Walk:
    """A causal language model whose blocks are loaded one at a time.

    Args:
        parameter: name of the setting that names the model, for messages.
        folder: its checkpoint.
        dtype: number format of weights and hidden states.
        device: where blocks run.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: the folder is not a checkpoint.
        ReplayError: its model has no list of blocks.
    """

    def __init__(
        self, parameter: str, folder: str | Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        self.parameter, self.dtype, self.device = parameter, dtype, device
        self.model, self.weights = open_model(folder, dtype, device, trust_remote_code)
        try:
            self.name, self.blocks = find_blocks(parameter, self.model)
        except ValueError as error:
            raise ReplayError(str(error)) from error

    def disk(self, texts: Iterable[Tensor]) -> int:
        """About how many bytes of disk it takes to write the model, in parts that are joined, while texts walk through it.

        Args:
            texts: token blocks [rows, seq_len] each.
        """
        tied = self.model.all_tied_weights_keys  # which are not stored
        weights = sum(parameter.numel() for name, parameter in self.model.named_parameters() if name not in tied)
        width = int(self.model.get_input_embeddings().weight.shape[1])
        numbers: int = weights + sum(text.numel() for text in texts) * width
        return 2 * numbers * self.dtype.itemsize

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, until the end of the `with`."""
        prefix = f"{self.name}.{index}."
        try:
            self.weights.load(self.device, lambda name: name.startswith(prefix))
            yield self.blocks[index]
        finally:
            unload(self.blocks[index])

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """The weights outside the blocks, until the end of the `with`."""
        prefix = f"{self.name}."
        try:
            self.weights.load(self.device, lambda name: not name.startswith(prefix))
            self.weights.tie()
            yield
        finally:
            unload(self.model, keep=self.blocks)

    @contextlib.contextmanager
    def part(self, number: int) -> Iterator[dict[str, Tensor]]:
        """What a checkpoint stores of a part of the model, by name, loaded until the end of the `with`.

        Args:
            number: 0 for what lies outside the blocks, then one for each block.
        """
        if number == 0:
            with self.outside():
                yield parameters_outside(self.model, self.blocks)
            return
        with self.block(number - 1) as block:
            yield {f"{self.name}.{number - 1}.{name}": tensor for name, tensor in block.state_dict().items()}

    def part_of(self, name: str) -> int:
        """The number of the part that has a weight."""
        inner = name.removeprefix(f"{self.name}.")
        return 0 if inner == name else 1 + int(inner.partition(".")[0])

    @property
    def parts(self) -> int:
        """Number of parts, see `part`."""
        return 1 + len(self.blocks)

    @contextlib.contextmanager
    def _instead(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Call `forward(index, the block's own forward, *args, **kwargs)` wherever the model calls a block."""
        try:
            for index, block in enumerate(self.blocks):
                block.forward = functools.partial(forward, index, block.forward)
            yield
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)  # so that the class's own method is used again

    def _decode(self, ids: Tensor) -> Tensor:
        """The last hidden states that the model's decoder gives for ids [batch, seq_len]."""
        with replayable(self.parameter):
            hidden: Tensor = self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def _calls(self, ids: Tensor, known: list[Call] | None = None) -> tuple[Tensor, list[Call]]:
        """What the blocks are called with for ids [batch, seq_len]; they are skipped, but for the very first call.

        Args:
            ids: tokens.
            known: what they were called with for another batch: equal tensors are kept once.

        Returns:
            (the first block's input, the calls).

        Raises:
            ReplayError: they are not called once each, in order, with the hidden states first.
        """
        calls: list[Call] = []
        inputs: list[Tensor] = []
        rule = f"{self.parameter} must call its blocks once each, in order, with the hidden states first"

        def record(index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            if index != len(calls) or first is None or first.shape[:2] != ids.shape:
                raise ReplayError(rule)
            if not calls:
                inputs.append(first.clone())
            calls.append(share((args[1:], kwargs), known[index] if known else (calls[-1] if calls else None)))
            return self._formed(first, original, args, kwargs)

        with self._instead(record):
            self._decode(ids)
        if len(calls) != len(self.blocks):
            raise ReplayError(f"{rule}, {len(calls)} of {len(self.blocks)} were called")
        handed_on = {id(part) for part in tree_leaves(self._rest) if isinstance(part, Tensor)}
        if any(id(part) in handed_on for part in tree_leaves(calls)):
            raise ReplayError(f"{self.parameter} must have blocks that hand on nothing but their hidden states")
        return inputs[0], calls

    def _formed(self, hidden: Tensor, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hidden states as a block returns them: alone, or first in a tuple. The first block is run once to see which."""
        if not hasattr(self, "_rest"):
            with self.block(0):
                output = original(*args, **kwargs)
            self._rest = output[1:] if isinstance(output, tuple) else None
        return hidden if self._rest is None else (hidden, *self._rest)

    @torch.no_grad()
    def check(self) -> None:
        """Check that running the blocks one by one gives what the model itself computes, on a few tokens.

        Raises:
            ReplayError: it does not, as where blocks pass each other keys and values.
            ValueError: `decoder_and_head` refuses the model.
        """
        faults: list[str] = []
        last: list[Tensor] = []
        kind = type(self.model).__name__

        def compare(index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with self.block(index):
                output = original(*args, **kwargs)
                hidden = first_of(output)
                try:
                    more, named = calls[index]
                    replayed = first_of(original(args[0], *more, **named))
                    if differ(hidden, replayed) or (index and differ(last[0], args[0])):
                        faults.append(f"those of {kind} give other results one by one")
                except Exception as error:  # whatever the model's code raises if it lacks what other blocks gave it
                    faults.append(f"{kind} fails otherwise: {one_line(error)}")
            last[:] = [hidden]
            return output

        with self.outside():
            ids = probe_ids(self.model)
            # each block's own copy: an object that they share would carry what other blocks have left in it
            calls = [copy.deepcopy(call) for call in self._calls(ids)[1]]
            with self._instead(compare):
                decoder_and_head(self.model, self.parameter)
        if faults:
            raise ReplayError(
                f"{self.parameter} must have blocks that depend on each other by their hidden states alone, {faults[0]}"
            )

    @torch.no_grad()
    def record(self, ids: Tensor, folder: Path, name: str, fresh: bool, tokens: int | None = None) -> Stream:
        """Begin a walk of token blocks; what lies outside the blocks must be loaded.

        Args:
            ids: tokens [rows, seq_len].
            folder: where to keep hidden states.
            name: of their files.
            fresh: whether to write those before the first block; if not, an earlier process has got further.
            tokens: see `batches_of`.

        Raises:
            ReplayError: see `check`.
            OSError: the disk is too full.
        """
        calls: list[list[Call]] = []
        files: list[Activations] = []
        batches = batches_of(ids, tokens)
        for rows in batches:
            hidden, called = self._calls(ids[rows.start : rows.stop], calls[0] if calls else None)
            calls.append(called)
            if not files:
                shape = (len(ids), *hidden.shape[1:])
                files = [Activations(folder / f"{name}.{parity}", shape, hidden.dtype) for parity in (0, 1)]
            if fresh:
                files[0].write(rows, hidden)
        return Stream(ids, batches, calls, (files[0], files[1]))

    def twin(self, stream: Stream, folder: Path, name: str, fresh: bool) -> Stream:
        """Another walk of the same tokens, with hidden states of its own. Arguments as for `record`."""
        files = [Activations(folder / f"{name}.{parity}", each.shape, each.dtype) for parity, each in enumerate(stream.files)]
        if fresh:
            for rows in stream.rows:
                files[0].write(rows, stream.files[0].read(rows, torch.device("cpu")))
        return replace(stream, files=(files[0], files[1]))

    @torch.no_grad()
    def advance(self, stream: Stream, index: int) -> None:
        """Run a text through block `index`, which must be loaded. Raises the error of `check_finite`."""
        for batch in stream.batches(index, self.device):
            with replayable(self.parameter):
                hidden = run_block(self.blocks[index], batch)
            check_finite(hidden, self.blocks[index], batch, f"{self.name}.{index}")
            stream.before(index + 1).write(batch.rows, hidden)

    @torch.no_grad()
    def losses(self, stream: Stream) -> Tensor:
        """Sum of the losses over each row's predicted tokens, float64 [rows], after the last block."""
        head = Head(self.model)
        found = []
        for rows, hidden in self.outputs(stream):
            found.append(token_losses(hidden, head, stream.ids[rows.start : rows.stop].to(self.device)))
        return torch.cat(found)

    @torch.no_grad()
    def outputs(self, stream: Stream) -> Iterator[tuple[range, Tensor]]:
        """The decoder's last hidden states, after the last block: (rows, [len(rows), seq_len, width]) batch by batch."""
        for batch in stream.batches(len(self.blocks), self.device):

            def unchanged(
                _: int, original: Callable[..., Any], *args: Any, hidden: Tensor = batch.hidden, **kwargs: Any
            ) -> Any:
                return self._formed(hidden, original, args, kwargs)

            with self._instead(unchanged):
                hidden = self._decode(stream.ids[batch.rows.start : batch.rows.stop])
            yield batch.rows, hidden
