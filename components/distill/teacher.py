"""The teacher's final hidden states, either computed each time or computed once and cached on disk.

Hidden states give the exact logits but are much smaller: 2 bytes times the width per token, against 4 bytes times the
vocabulary. With the cache they are rounded to bfloat16 in every epoch, so a run does not depend on what was already cached.
They are computed before training, by a walk through the teacher, of which only the head takes memory afterwards.
"""

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from components.core import processes
from components.core.checkpoint.loading import load_model, open_model
from components.core.head import Head
from components.core.locks import LOCK, turn
from components.core.perplexity import decoder_and_head
from components.core.progress import log
from components.core.walk.measure import walk_through
from components.core.walk.walk import ReplayError, Walk
from components.core.walk.work import Work
from components.distill.backends import SingleProcess
from components.distill.cache import WALK_BYTES, Cache


class Teacher:
    """The dense model, which provides the hidden states of training blocks.

    Args:
        blocks: training tokens [blocks, seq_len].
        head: hidden states → logits.
        decoder: ids → hidden states; None if all states are in the cache.
        cache: the states, or None to compute them each time.
    """

    def __init__(self, blocks: Tensor, head: Head, decoder: nn.Module | None, cache: Cache | None) -> None:
        self.blocks, self.head, self.decoder, self.cache = blocks, head, decoder, cache
        self.device = head.weight.device

    @torch.no_grad()
    def hidden(self, rows: Tensor, of_blocks: bool = False) -> tuple[Tensor, ...]:
        """Hidden states of training blocks, by index, as from `hidden_states`; a cache has the final ones alone."""
        if self.cache is not None:
            return (self.cache.states[rows].to(self.device, self.head.weight.dtype),)
        assert self.decoder is not None
        return hidden_states(self.decoder, self.blocks[rows].to(self.device), of_blocks)


def hidden_states(decoder: nn.Module, ids: Tensor, of_blocks: bool) -> tuple[Tensor, ...]:
    """The final hidden states [batch, seq_len, width] that a decoder gives for ids [batch, seq_len], which come last.

    Args:
        decoder: ids → hidden states.
        ids: tokens.
        of_blocks: give those after each block but the last before them.
    """
    output = decoder(input_ids=ids, use_cache=False, output_hidden_states=of_blocks)
    return (*output.hidden_states[1:-1], output.last_hidden_state) if of_blocks else (output.last_hidden_state,)


def make_teacher(
    folder: Path,
    blocks: Tensor,
    used: Tensor,
    cache: Cache | None,
    backend: SingleProcess,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> Teacher:
    """Load the teacher, or compute its states and load its head alone; every process must call this.

    Args:
        folder: its checkpoint.
        blocks: training tokens [blocks, seq_len].
        used: which of them the run sees.
        cache: where its states are to be kept, or None.
        backend: distributes a teacher that is used in training.
        dtype: its number format.
        trust_remote_code: run code that comes with it.
    """
    if cache is None:
        model, weights = open_model(folder, dtype, backend.device, trust_remote_code)
        decoder, head = backend.load(model, weights, ())
        return Teacher(blocks, head, decoder, None)
    head = compute_states(folder, blocks, used, cache, dtype, backend.device, trust_remote_code)
    backend.barrier()  # every process of this machine has computed its share
    return Teacher(blocks, head, None, cache)


@torch.no_grad()
def compute_states(
    folder: Path,
    blocks: Tensor,
    used: Tensor,
    cache: Cache,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> Head:
    """Compute this process's share of the teacher's states that are not in the cache; returns the teacher's head.

    Arguments as for `make_teacher`.
    """
    count, rank = processes.processes_here(), processes.rank_here()
    fits = WALK_BYTES // (cache.states.shape[1:].numel() * dtype.itemsize)
    size = max(1, min(fits, -(-len(used) // count)))
    shares = [rows for number, rows in enumerate(used.split(size)) if number % count == rank]
    missing = [rows for rows in shares if not bool(cache.known[rows].all())]
    try:
        walk = Walk("teacher_model", folder, dtype, device, trust_remote_code)
        if missing:
            walk.check()
        for number, rows in enumerate(missing):
            what = f"teacher's states, part {number + 1} of {len(missing)}"
            fill(walk, blocks, rows, cache, what)
        with walk.outside():
            return copy.deepcopy(Head(walk.model))
    except ReplayError as error:
        log(f"the whole teacher is loaded: {error}")
        decoder, head = decoder_and_head(load_model(folder, dtype, device, trust_remote_code), "teacher_model")
        for row in torch.cat([torch.empty(0, dtype=torch.long), *missing]).split(1):
            states = decoder(input_ids=blocks[row].to(device), use_cache=False).last_hidden_state
            cache.states[row] = states.to(torch.bfloat16).cpu()
            cache.known[row] = 1
        return head


def fill(walk: Walk, blocks: Tensor, rows: Tensor, cache: Cache, what: str) -> None:
    """Compute the states of some training blocks, and put them into the cache, unless a run beside this one has done so."""
    place = cache.folder / f"walk-{int(rows[0])}-{len(rows)}"
    with turn(place.with_suffix(LOCK), what):
        if bool(cache.known[rows].all()):
            return
        stream = walk_through(walk, blocks[rows], Work(place, what), what)
        with walk.outside():
            for part, states in walk.outputs(stream):
                cache.states[rows[part.start : part.stop]] = states.to(torch.bfloat16).cpu()
        cache.known[rows] = 1
        shutil.rmtree(place)
