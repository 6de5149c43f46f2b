"""What the stores of all schemes share."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

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
