"""The cache of the teacher's final hidden states: its name, its space on disk, and what becomes of it after a kill."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from components.core import processes
from components.core.checkpoint.checks import inspect_checkpoint
from components.core.checkpoint.files import weight_files
from components.core.files import check_room, new_file, sample_fingerprint
from components.core.history import versions
from components.core.locks import remove_unused, use
from components.core.tokens import id_fingerprint
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig

STATES = "states"  # the file in the folder of a cache
WALK_BYTES = 2 * 10**9  # of hidden states that a process computes at a time, on each of two files


def cache_name(folder: Path, blocks: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    """A name for the hidden states of training blocks, made from everything that they depend on.

    So a cache left behind by a killed run is used again by the same run, and by no other.

    Args:
        folder: the teacher's checkpoint.
        blocks: training tokens [blocks, seq_len].
        dtype: the teacher's compute dtype.
        device: where it runs.
    """
    used = versions()
    parts = {
        "teacher": sample_fingerprint([folder / "config.json", *weight_files(folder)]),
        "tokens": id_fingerprint(blocks),
        "computed": [str(dtype), device.type, used["torch"], used["transformers"]],
    }
    return f"teacher-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def remove_caches(output: Path, keep: Path | None) -> None:
    """Remove the caches beside an output that killed runs left, except for `keep`."""
    name = re.compile(re.escape(output.name) + r"\.teacher-[0-9a-f]{12}")
    beside = output.parent.iterdir() if output.parent.is_dir() else ()
    remove_unused(path for path in beside if name.fullmatch(path.name) and path != keep)


class Cache:
    """Hidden states of training blocks, in a file mapped into memory and shared by the processes of a machine.

    The file holds the states and then a flag for each block, which is set after its states are written. It appears with its
    whole space reserved: on a disk that fills up, writing to a hole of a mapped file would kill the process.

    Args:
        folder: the cache's folder, on a local disk.
        shape: blocks, seq_len and width.

    Raises:
        ValueError: its space cannot be reserved; nothing is left.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder = folder
        lock = None
        while lock is None:
            folder.mkdir(parents=True, exist_ok=True)
            lock = use(folder)
        self._lock = lock
        file, size = folder / STATES, cache_bytes(shape)
        if not file.is_file() or file.stat().st_size != size:  # of another size: damaged
            try:
                file.unlink(missing_ok=True)
                with new_file(file) as scratch, scratch.open("wb") as opened:
                    os.posix_fallocate(opened.fileno(), 0, size)
            except BaseException as error:
                self._lock.close()
                remove_unused([folder])
                if isinstance(error, OSError):
                    raise ValueError(f"teacher_cache must have {size / 1e9:.2f} GB of disk at {folder}: {error}") from error
                raise
        whole = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
        self.states = whole[: -shape[0]].view(torch.bfloat16).view(shape)
        self.known = whole[-shape[0] :]

    def remove(self) -> None:
        """Delete the cache from disk, unless another run uses it, which then does so."""
        self._lock.close()
        remove_unused([self.folder])


def cache_bytes(shape: tuple[int, int, int]) -> int:
    """Size of a cache's file. Arguments as in `Cache`."""
    return 2 * math.prod(shape) + shape[0]


def missing_bytes(folder: Path, shape: tuple[int, int, int]) -> int:
    """How much more disk a cache needs: nothing if a killed run has left it. Arguments as in `Cache`."""
    file, size = folder / STATES, cache_bytes(shape)
    return 0 if file.is_file() and file.stat().st_size == size else size


def walk_bytes(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """How much disk the hidden states take while they are computed, by all processes of this machine. Arguments as above."""
    return 2 * min(processes.processes_here() * WALK_BYTES, math.prod(shape) * dtype.itemsize)


@contextlib.contextmanager
def teacher_cache(
    config: DistillConfig, teacher_folder: Path, blocks: Tensor, dtype: torch.dtype, backend: SingleProcess, written: int
) -> Iterator[Cache | None]:
    """Yield the cache for the teacher's states, or None if there is to be none; it is deleted at the end of the block.

    Before that, what killed runs of other settings left is removed, and there must be room for the cache and the model.

    Args:
        config: the stage's settings.
        teacher_folder: the teacher's checkpoint.
        blocks: training tokens [blocks, seq_len].
        dtype: the teacher's compute dtype.
        backend: that of this process.
        written: bytes of disk that this process takes to write and measure the model.

    Raises:
        ValueError: the disk is too full.
    """
    output = Path(config.output_dir).absolute()
    folder = output.with_name(f"{output.name}.{cache_name(teacher_folder, blocks, dtype, backend.device)}")
    if processes.is_first_here():
        remove_caches(output, keep=folder if config.caches_teacher() else None)
    if not config.caches_teacher():
        check_room("output_dir", config.output_dir, written, ", with its parts and the hidden states on their way")
        yield None
        return
    shape = (len(blocks), blocks.shape[1], head_width(teacher_folder, config.trust_remote_code))
    if processes.is_first_here():
        size = missing_bytes(folder, shape)
        share = f", {size / 1e9:.2f} GB of it for teacher_cache"
        later = max(written, walk_bytes(shape, dtype))  # of which the one is gone before the other
        check_room("output_dir", config.output_dir, size + later, share)
    else:
        backend.barrier()  # the first process here reserves the space
    cache = Cache(folder, shape)
    try:
        if processes.is_first_here():
            backend.barrier()
        yield cache
    finally:
        if processes.is_first_here():
            cache.remove()


def head_width(teacher_folder: Path, trust_remote_code: bool) -> int:
    """Width of the teacher's final hidden states, without reading its weights."""
    _, empty = inspect_checkpoint("teacher_model", teacher_folder, trust_remote_code)
    return int(empty.get_output_embeddings().weight.shape[1])  # type: ignore[operator]
