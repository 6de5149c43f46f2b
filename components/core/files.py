"""Atomic outputs: a file or folder appears under its name complete, or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from components.core.errors import shown

NAME_ROOM = 48  # bytes that names of temporary files beside an output are longer than its own


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
    free = shutil.disk_usage(place).free
    if bytes_needed > free:
        raise ValueError(f"{parameter} needs about {bytes_needed / 1e9:.2f} GB of disk, {place} has {free / 1e9:.2f} GB free")


def check_folder(parameter: str, path: str | os.PathLike[str]) -> None:
    """Check, before any heavy work, that `path` is a folder to write to, or can become one.

    Raises:
        ValueError: it is not a folder, is not writable, or cannot be created.
    """
    target = Path(path).absolute()
    if os.path.lexists(target):
        if not target.is_dir() or not os.access(target, os.W_OK | os.X_OK):
            raise ValueError(f"{parameter} must be a folder that can be written, got {path}")
    else:
        check_new(parameter, path)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling folder that is renamed to `path` if the block succeeds, and removed otherwise."""
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield scratch
        _restore_usual_modes(scratch)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _restore_usual_modes(path: Path) -> None:
    """Give a file or a folder with its contents the usual modes: mkdtemp and safetensors make them private, pods share them."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in (path, *path.rglob("*")):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling path that replaces `path` if the block succeeds, and is removed otherwise."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        yield scratch
        _restore_usual_modes(scratch)
        scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN raises ValueError, as it is not valid JSON."""
    with new_file(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from error


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


def stat_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 over the names, sizes and modification times of files: cheap, and changes whenever a file does."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
