"""Perplexity of a checkpoint, as it is on disk, with one block in memory at a time."""

from pathlib import Path

import torch
from torch import Tensor

from components.core.checkpoint.loading import load_model
from components.core.perplexity import from_losses, perplexity
from components.core.progress import log, track
from components.core.walk.stream import Stream
from components.core.walk.walk import ReplayError, Walk
from components.core.walk.work import Work


def measure(
    parameter: str,
    folder: str | Path,
    blocks: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    place: Path,
    trust_remote_code: bool = False,
) -> float:
    """Perplexity of a dense, sparse or quantized checkpoint.

    A model whose blocks cannot be run one by one is loaded whole, which is logged.

    Args:
        parameter: name of the setting that names the checkpoint, for messages.
        folder: the checkpoint.
        blocks: token ids [blocks, seq_len].
        dtype: number format of weights and hidden states.
        device: where blocks run.
        place: a folder for hidden states; if it has those of the same walk that was killed, the walk goes on.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: the checkpoint cannot be loaded or is not a causal language model, or the result is not finite.
        OSError: the disk is too full.
    """
    work = Work(place, "perplexity")
    try:
        walk = Walk(parameter, folder, dtype, device, trust_remote_code)
        if not work.results:
            walk.check()
        stream = walk_through(walk, blocks, work, "perplexity")
        with walk.outside():
            return from_losses(walk.losses(stream), blocks)
    except ReplayError as error:
        log(f"the whole model is loaded: {error}")
        return perplexity(load_model(folder, dtype, device, trust_remote_code), blocks, parameter)


def walk_through(walk: Walk, blocks: Tensor, work: Work, what: str) -> Stream:
    """Run token blocks [blocks, seq_len] through all of a decoder's blocks, going on after those that are finished.

    Args:
        walk: the model.
        blocks: token ids.
        work: what is finished; its folder has the hidden states.
        what: name of the work, shown with the progress.

    Raises:
        ReplayError: the blocks cannot be run one by one.
        OSError: the disk is too full.
    """
    done = len(work.results)
    with walk.outside():
        stream = walk.record(blocks, work.folder, "hidden", fresh=not done)
    for index in track(range(done, len(walk.blocks)), what, len(walk.blocks) - done):
        with walk.block(index):
            walk.advance(stream, index)
        work.commit({}, activations=[stream.before(index + 1)])
    return stream
