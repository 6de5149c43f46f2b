"""Atomic outputs: a file or folder appears under its name complete, or not at all."""

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from components.core.errors import shown
from components.core.locks import only_user, remove_unused, use
from components.core.progress import log

NAME_ROOM = 48  # bytes that names of temporary files beside an output may be longer than its own
PARTIAL = ".partial"
UNFINISHED = ".unfinished"
FINISHED = "finished-*.json"  # in a folder for work: each says that a piece of it is finished


def check_new(parameter: str, path: str | os.PathLike[str], bytes_needed: int = 0) -> None:
    """Check, before any heavy work, that `path` can be created.

    Args:
        parameter: name of the setting, for the error message.
        path: the file or folder to be created.
        bytes_needed: approximate size of what will be written there.

    Raises:
        ValueError: `path` already exists, its folder is not writable, its name is too long, or the disk is too full.
    """
    if "://" in str(path):
        raise ValueError(f"{parameter} must be a path on this machine, got {shown(str(path))}")
    target = Path(path).absolute()
    if os.path.lexists(target):  # unlike Path.exists, this treats an inaccessible path as missing
        raise ValueError(f"{parameter} must not exist yet, got {path}")
    place = next(folder for folder in target.parents if os.path.lexists(folder))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{parameter} must lie in a folder that can be written, got {path}")
    longest = os.pathconf(place, "PC_NAME_MAX") - NAME_ROOM
    if any(len(os.fsencode(part)) > longest for part in target.relative_to(place).parts):
        raise ValueError(f"{parameter} must have names of at most {longest} bytes, got {path}")
    remove_unused(_scratch_folders(target))
    check_room(parameter, path, bytes_needed)


def check_room(parameter: str, path: str | os.PathLike[str], bytes_needed: int, share: str = "") -> None:
    """Check that there is room for `path` on its disk.

    Args:
        parameter: name of the setting, for the error message.
        path: the file or folder to be created.
        bytes_needed: approximate size of what will be written there.
        share: which part of it is for something else, for the error message.

    Raises:
        ValueError: the disk is too full.
    """
    place = next(folder for folder in Path(path).absolute().parents if os.path.lexists(folder))
    free = shutil.disk_usage(place).free
    if bytes_needed > free:
        raise ValueError(
            f"{parameter} needs about {bytes_needed / 1e9:.2f} GB of disk{share}, {place} has {free / 1e9:.2f} GB free"
        )


def check_folder(parameter: str, path: str | os.PathLike[str]) -> None:
    """Check, before any heavy work, that `path` is a folder to write to, or can become one.

    Raises:
        ValueError: it is not a folder, is not writable, or cannot be created.
    """
    target = Path(path).absolute()
    if os.path.lexists(target):
        try:
            with tempfile.TemporaryFile(dir=target):  # there are folders, such as in /sys, where root may write but cannot
                pass
        except OSError as error:
            raise ValueError(f"{parameter} must be a folder that can be written, got {path}: {error.strerror}") from error
    else:
        check_new(parameter, path)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds, and removed otherwise."""
    with new_directory_and_work(path) as (scratch, _):
        yield scratch


@contextlib.contextmanager
def new_directory_and_work(path: str | os.PathLike[str], beside: str = "") -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds, and one for work on the way there.

    Args:
        path: the folder to be created.
        beside: a file to be created together with the folder, from the one of its name in the folder for work; empty = none.

    Returns:
        (the folder that becomes `path`, the folder for work), on one disk; both are removed if the block fails.
    """
    target = Path(path).absolute()
    with _scratch(target) as scratch:
        work = scratch.with_name(f"{target.name}.work")
        scratch.mkdir()
        work.mkdir()
        yield scratch, work
        _restore_usual_modes(scratch)
        _put_in_place(scratch, target, work, Path(beside).absolute() if beside else None)


@contextlib.contextmanager
def scratch_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is removed after the block; so are those that killed processes left."""
    with _scratch(Path(path).absolute()) as scratch:
        scratch.mkdir()
        yield scratch


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block succeeds, and is removed otherwise."""
    target = Path(path).absolute()
    with _scratch(target) as scratch:
        yield scratch
        _restore_usual_modes(scratch)
        scratch.replace(target)


@contextlib.contextmanager
def resumable_directory(
    parameter: str, path: str | os.PathLike[str], key: str, beside: str = ""
) -> Iterator[tuple[Path, Path]]:
    """Yield a folder that is renamed to `path` if the block succeeds, and one for work on the way there.

    If some piece of work is finished, and then the process is killed or fails for a reason that may pass, both are kept, and
    found again with the same key. What other keys left beside `path` is removed.

    Args:
        parameter: name of the setting, for the error message.
        path: the folder to be created.
        key: a name for all that the result depends on.
        beside: a file to be created together with the folder, from the one of its name in the folder for work; empty = none.

    Returns:
        (the folder that becomes `path`, the folder for work).

    Raises:
        ValueError: another process is doing the same work.
    """
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{key}{UNFINISHED}")
    if others := [other for other in _beside(target, UNFINISHED) if other != folder]:
        log(f"{parameter}: what a run with other settings or inputs left unfinished is removed")
        remove_unused(others)
    output, work = folder / target.name, folder / "work"
    with only_user(parameter, folder, f"{parameter} {path}"):
        try:
            output.mkdir(exist_ok=True)
            work.mkdir(exist_ok=True)
            yield output, work
            _restore_usual_modes(output)
            _put_in_place(output, target, work, Path(beside).absolute() if beside else None)
        except BaseException as error:
            # a ValueError is a fault of settings or inputs, which would be the same again
            if not isinstance(error, ValueError) and any(work.rglob(FINISHED)):
                log(f"{parameter}: what has been finished is kept beside {path}; the same command goes on from there")
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(output: Path, target: Path, work: Path, beside: Path | None) -> None:
    """Rename a folder to its target, and with it a file of the work folder; if one fails, neither is left."""
    if beside is None:
        output.rename(target)
        return
    with _scratch(beside) as scratch:
        shutil.copyfile(work / beside.name, scratch)
        _restore_usual_modes(scratch)
        try:
            scratch.replace(beside)
            output.rename(target)
        except BaseException:
            if output.exists():
                beside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Yield a path to write to before it is renamed to `target`: in a private folder beside it, so on the same disk.

    The folder is in use as long as this process lives; those that killed processes left beside `target` are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_unused(_scratch_folders(target))
    lock = None
    try:
        while lock is None:  # until it is marked as in use, another process may take it for a dead one's
            folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
            _not_removed.add((os.getpid(), folder))
            folder.mkdir(mode=0o700)
            lock = use(folder)
        yield folder / target.name
    finally:
        if lock:
            lock.close()  # NFS does not remove a folder with an open file
        shutil.rmtree(folder, ignore_errors=True)
        _not_removed.discard((os.getpid(), folder))


_not_removed: set[tuple[int, Path]] = set()  # by which process, and which of the folders of `_scratch`


@atexit.register
def _remove_scratch() -> None:
    """Remove what is left if SIGTERM has interrupted the creation or the removal of a folder."""
    for process, folder in _not_removed:
        if process == os.getpid():  # and not one that this process was forked from
            shutil.rmtree(folder, ignore_errors=True)


def _scratch_folders(target: Path) -> list[Path]:
    """The folders of `_scratch` beside a target, of all processes."""
    return _beside(target, PARTIAL)


def _beside(target: Path, suffix: str) -> list[Path]:
    """The folders for temporary files with a suffix beside a target, of all processes."""
    try:
        beside = list(target.parent.iterdir())
    except OSError:  # not there yet, or it can be written but not listed
        return []
    return [path for path in beside if path.name.startswith(f".{target.name}.") and path.suffix == suffix]


def _restore_usual_modes(path: Path) -> None:
    """Give a file or a folder with its contents the usual modes: `_scratch` and safetensors make them private, pods share."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in (path, *path.rglob("*")):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN raises ValueError, as it is not valid JSON."""
    with new_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sample_fingerprint(files: Iterable[Path], samples: int = 64, size: int = 65536) -> str:
    """SHA-256 over the sizes of files and evenly spread samples of them: distinguishes models without reading them in full."""
    digest = hashlib.sha256()
    for path in files:
        length = path.stat().st_size
        digest.update(f"{length}\n".encode())
        with path.open("rb") as file:
            for piece in range(samples):
                file.seek(piece * max(length - size, 0) // max(samples - 1, 1))
                digest.update(file.read(size))
    return digest.hexdigest()


def content_fingerprint(path: Path) -> str:
    """SHA-256 of a whole file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stat_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the names, sizes and modification times of files: cheap, and changes whenever a file does."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
