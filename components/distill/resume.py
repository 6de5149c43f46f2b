"""Checkpoints from which a killed training run resumes: `torch.distributed.checkpoint` plus a manifest.

A checkpoint is a folder `step-00000040` with the trained weights, Adam's moments, ADMM's variables, each process's random
state, and `manifest.json`. The manifest is written last: a folder without one is incomplete and never read, whatever its date.
It has the size and checksum of every file, and its own checksum, so that a damaged checkpoint is found before any of it is
used. Weights, moments and variables are stored with their global shapes, so a different number of FSDP processes can resume
from them. The library's own index is a pickle: resume only from folders that nobody else can write to.
"""

import base64
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c

from components.core import processes
from components.core.files import write_json
from components.core.locks import only_user
from components.core.processes import from_all, is_main
from components.core.progress import log
from components.core.reading import read_json
from components.core.settings import affecting
from components.core.storage.base import Held
from components.core.storage.listing import checksums
from components.core.storage.place import is_bucket
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig
from components.distill.schedule import restore_schedule

T = TypeVar("T")
MANIFEST = "manifest.json"
CHECKSUM = "crc32c"  # the manifest's key for its own checksum


def identity(config: DistillConfig, inputs: Mapping[str, str], global_batch: int) -> dict[str, Any]:
    """What must not change for a run to resume: settings, fingerprints of its inputs, and the blocks per step.

    It may resume with other values of the settings that do not affect the result, see `components.core.settings`.
    """
    return {**inputs, "global_batch": global_batch, "settings": affecting(config)}


class DamagedError(Exception):
    """A checkpoint cannot be used; the message names file and fault."""


@contextlib.contextmanager
def claim(config: DistillConfig) -> Iterator[None]:
    """Have `checkpoint_dir` alone for this run while the block runs; the first process does this for all.

    In a bucket each run has a place of its own, see `remote`.

    Raises:
        ValueError: another run uses it.
    """
    if not config.checkpoint_dir or is_bucket(config.checkpoint_dir) or not is_main():
        yield
        return
    with only_user("checkpoint_dir", Path(config.checkpoint_dir), f"output_dir {config.output_dir}"):
        yield


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def save(
    backend: SingleProcess,
    config: DistillConfig,
    step: int,
    identity: Mapping[str, Any],
    progress: dict[str, Any],
    is_shared: bool = True,
) -> None:
    """Write a checkpoint and delete old ones; every process must call this.

    Args:
        backend: the backend that trains.
        config: the stage's settings.
        step: number of steps that have been taken.
        identity: see `identity`.
        progress: what the loop needs to go on.
        is_shared: whether all machines see the same folder; if not, each has a folder of its own with its part.

    Raises:
        OSError: it could not be written; nothing of it is left, and the older ones are as they were.
    """
    folder = Path(config.checkpoint_dir) / f"step-{step:08d}"
    is_first = backend.rank == 0 if is_shared else processes.is_first_here()
    if is_first and folder.exists():
        shutil.rmtree(folder)  # left incomplete by a killed run, or damaged
    backend.barrier()
    try:
        backend.save_state(folder)
        backend.barrier()  # the files of all processes are there
        parts = shared(lambda: listing_of(folder) if is_first else {})
        content = {
            "step": step,
            "world_size": backend.world_size,
            "form": backend.checkpoint_form,
            "has_best": bool(backend.best),
            "scaler": backend.scaler.state_dict(),
            "identity": identity,
            "progress": progress,
            "files": {name: held for part in parts for name, held in part.items()},
        }
        whole = content | {CHECKSUM: content_checksum(content)}
        shared(lambda: write_json(folder / MANIFEST, whole) if backend.rank == 0 else None)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if is_first:
        kept = [path for path in checkpoints(folder.parent) if path <= folder][-config.keep_checkpoints :]
        for old in set(folder.parent.glob("step-*")) - {*kept, folder}:  # incomplete and damaged ones too
            shutil.rmtree(old, ignore_errors=True)
    if backend.rank == 0:
        log(f"checkpoint: {folder}")
    backend.barrier()


def shared(work: Callable[[], T]) -> list[T]:
    """What every process gets from its work. Raises OSError on all of them if one fails, so that none waits for another."""
    result, fault = None, None
    try:
        result = work()
    except OSError as error:
        fault = error
    results = from_all((result, str(fault) if fault else ""))
    if fault:
        raise fault
    if faults := [text for _, text in results if text]:
        raise OSError(faults[0])
    return [result for result, _ in results]  # type: ignore[misc]


def listing_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → size and checksum of every file of a checkpoint but its manifest."""
    return {name: held._asdict() for name, held in checksums(files_of(folder)).items()}


def files_of(folder: Path) -> dict[str, Path]:
    """Name → path of every file of a checkpoint but its manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if name != MANIFEST}


def content_checksum(content: Mapping[str, Any]) -> str:
    """CRC-32C of JSON data, in base64; the order of keys does not matter."""
    return base64.b64encode(google_crc32c.Checksum(json.dumps(content, sort_keys=True).encode()).digest()).decode()


def load(backend: SingleProcess, config: DistillConfig, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Resume from the newest whole checkpoint, skipping damaged ones; every process must call this.

    Returns:
        its manifest, or None if there is no whole checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another run (the first difference is named) or another backend, is not on all
            machines, or is whole but cannot be read by the library, and there is no older one.
    """
    faults: list[Exception] = []
    for folder in backend.from_first(checkpoints(Path(config.checkpoint_dir))[::-1]):
        if backend.any(not folder.is_dir()):
            raise ValueError(f"checkpoint_dir must be a folder that all machines share, {folder} is not on all of them")
        try:
            manifest = read_whole(backend, config, folder, identity)
            backend.load_state(folder, manifest["world_size"] == backend.world_size, manifest["has_best"])
        except (DamagedError, OSError) as error:
            log(f"skipped a damaged checkpoint: {error}")
            faults.append(error)
            continue
        restore_schedule(backend.optimizer, backend.schedule, manifest["step"])
        backend.scaler.load_state_dict(manifest["scaler"])
        log(f"resuming from {folder}")
        return manifest
    if unread := [fault for fault in faults if isinstance(fault, OSError)]:  # some of it may have been read over the weights
        raise ValueError(f"checkpoint_dir must hold a checkpoint that can be read, or none: {unread[0]}")
    if faults:
        log(f"no checkpoint in {config.checkpoint_dir} is whole: training starts from the beginning")
    return None


def read_whole(backend: SingleProcess, config: DistillConfig, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole and belongs to this run.

    Raises:
        DamagedError: it is not whole.
        ValueError: it belongs to another run or backend.
    """
    manifest = on_first(backend, lambda: read_manifest(folder))
    if manifest["identity"] != dict(identity):
        raise ValueError(
            f"checkpoint_dir must hold checkpoints of this run, {folder} differs in {_difference(manifest, identity)}"
        )
    if manifest["form"] != backend.checkpoint_form:
        raise ValueError(
            f"backend must read checkpoints of form {manifest['form']!r}, {config.backend} reads {backend.checkpoint_form!r}"
        )
    on_first(backend, lambda: check_files(folder, manifest["files"]))
    return manifest


def on_first(backend: SingleProcess, read: Callable[[], T]) -> T:
    """What the first process reads, on all processes.

    Raises:
        DamagedError: on all of them, if reading raises ValueError or OSError.
    """
    found, fault = None, ""
    if backend.rank == 0:
        try:
            found = read()
        except (ValueError, OSError) as error:
            fault = str(error)
    found, fault = backend.from_first((found, fault))
    if fault:
        raise DamagedError(fault)
    return found  # type: ignore[return-value]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest. Raises ValueError unless it is as `save` wrote it; OSError if it cannot be read."""
    manifest = read_json(folder / MANIFEST, dict[str, Any])
    written = manifest.pop(CHECKSUM, None)
    if written is None or written != content_checksum(manifest):
        raise ValueError(f"{folder / MANIFEST} must be as it was written, its checksum differs")
    return manifest


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that a checkpoint's files are as the manifest lists them. Raises ValueError, which names the first that is not."""
    for name, held in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != held["size"]:
            raise ValueError(f"{folder / name} must have {held['size']} bytes, got {'no file' if size is None else size}")
    for name, found in checksums({name: folder / name for name in files}).items():
        if found != Held(**files[name]):
            raise ValueError(f"{folder / name} must have the checksum {files[name]['crc32c']}, got {found.crc32c}")


def _difference(manifest: dict[str, Any], identity: Mapping[str, Any]) -> str:
    then, now = manifest["identity"], dict(identity)
    for name in now.keys() - {"settings"}:
        if then.get(name) != now[name]:
            return f"{name}: {then.get(name)} then, {now[name]} now"
    names = [name for name in now["settings"] if then["settings"].get(name) != now["settings"][name]]
    return ", ".join(f"{name}: {then['settings'].get(name)} then, {now['settings'][name]} now" for name in names[:1])
