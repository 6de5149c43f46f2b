"""What the stores of all schemes share, and the store of a mounted folder."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from components.core.files import new_file

WORKERS = 8  # transfers at once
CHUNK = 16 * 2**20  # bytes of a piece of a large file; WORKERS of them are in memory at once


class Held(NamedTuple):
    """What a store tells of an object: bytes, and the CRC-32C in base64 where the store knows it."""

    size: int
    crc32c: str | None


class Store(Protocol):
    """Objects under one place, by their names relative to it. A missing or closed bucket gives a ValueError or OSError."""

    def list(self) -> dict[str, Held]:
        """All objects under the place."""

    def put(self, files: Mapping[str, Path]) -> None:
        """Write files as objects, in parallel."""

    def get(self, files: Mapping[str, Path]) -> None:
        """Write objects to files, in parallel; the folders of the files exist."""

    def read(self, name: str) -> bytes:
        """One small object. FileNotFoundError: there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Write one small object at one go, over an earlier one."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""


def split(sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Names of the files of up to `CHUNK` bytes, which travel whole, and of the others, which travel in pieces."""
    return [name for name in sizes if sizes[name] <= CHUNK], [name for name in sizes if sizes[name] > CHUNK]


class FolderStore:
    """A folder of a mounted volume."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> dict[str, Held]:
        """See `Store`."""
        paths = self.root.rglob("*")
        return {path.relative_to(self.root).as_posix(): Held(path.stat().st_size, None) for path in paths if path.is_file()}

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        for name in files:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        _each(lambda name: shutil.copyfile(files[name], self.root / name), files)

    def get(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        _each(lambda name: shutil.copyfile(self.root / name, files[name]), files)

    def read(self, name: str) -> bytes:
        """See `Store`."""
        return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        with new_file(self.root / name) as scratch:
            scratch.write_bytes(data)

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`; folders that this empties go too."""
        paths = [self.root / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in sorted({folder for path in paths for folder in path.parents}, reverse=True):
            if folder.is_relative_to(self.root):
                with contextlib.suppress(OSError):  # it is not empty, or another has removed it
                    folder.rmdir()


def _each(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Do `work` for every name, several at once; the first error ends it."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(work, names):
            pass
