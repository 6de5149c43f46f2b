"""What the stores of all schemes share."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

WORKERS = 8  # parallel transfers
CHUNK = 16 * 2**20  # bytes in one piece of a large file; WORKERS pieces are in memory at once


class Held(NamedTuple):
    """What a store reports about an object: its size in bytes, and its CRC-32C in base64 if the store knows it."""

    size: int
    crc32c: str | None


class Store(Protocol):
    """Objects under one place, named relative to it. A missing or inaccessible bucket raises ValueError or OSError."""

    def list(self) -> dict[str, Held]:
        """All objects under the place."""

    def put(self, files: Mapping[str, Path]) -> None:
        """Write files as objects, in parallel; an object that already has the same bytes has them all the time."""

    def get(self, files: Mapping[str, Path]) -> None:
        """Write objects to files, in parallel; the files' folders must exist."""

    def read(self, name: str) -> bytes:
        """Read one small object. Raises FileNotFoundError if it does not exist."""

    def write(self, name: str, data: bytes) -> None:
        """Write one small object atomically, replacing any earlier one."""

    def create(self, name: str, data: bytes) -> bool:
        """Write one small object atomically, unless it exists; of several writers at once, exactly one is told True."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""


def split(sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Split file names into those of up to `CHUNK` bytes, transferred whole, and the others, transferred in pieces."""
    return [name for name in sizes if sizes[name] <= CHUNK], [name for name in sizes if sizes[name] > CHUNK]
