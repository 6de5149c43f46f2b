"""`complete.json`: what a complete place holds, file by file, and whether it still does."""

import base64
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import google_crc32c
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from components.core.reading import parse_json
from components.core.storage.base import WORKERS, Held, Store

COMPLETE = "complete.json"
PIECE = 2**20  # bytes that are read at once


class File(TypedDict):
    """A file's entry in `complete.json`."""

    size: NonNegativeInt
    crc32c: str


class Listing(TypedDict):
    """The content of `complete.json`."""

    files: dict[str, File]


def checksum(path: Path) -> Held:
    """Size and CRC-32C of a file, read in pieces because a shard may be many gigabytes."""
    crc, size = google_crc32c.Checksum(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            crc.update(piece)
            size += len(piece)
    return Held(size, base64.b64encode(crc.digest()).decode())


def checksums(files: Mapping[str, Path]) -> dict[str, Held]:
    """`checksum` of every file, several at once."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(files, pool.map(checksum, files.values()), strict=True))


def check_held(store: Store, place: str, sums: Mapping[str, Held]) -> dict[str, Held]:
    """Check that the store reports every object with the expected size and checksum; returns what it reports.

    Raises:
        ValueError: an object is missing or differs.
    """
    there = store.list()
    for name, held in sums.items():
        found = there.get(name)
        if found is None or found.size != held.size or found.crc32c not in (None, held.crc32c):
            raise ValueError(f"{place}/{name} must be what was uploaded, {held}, got {found or 'no object'}")
    return there


def parse(data: bytes, place: str) -> dict[str, Held]:
    """Parse `complete.json`.

    Raises:
        ValueError: it is malformed, or a name in it leads outside the folder that it is downloaded to.
    """
    files = parse_json(data, f"{place}/{COMPLETE}", Listing)["files"]
    sums = {name: Held(**file) for name, file in files.items()}
    for name in sums:
        check_name(name, f"{place}/{COMPLETE}")
    return sums


def check_name(name: str, where: str) -> None:
    """Check that an object's name leads into the folder that it is downloaded to. Raises ValueError."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or parts[0] == "/" or ".." in parts or "\0" in name:
        raise ValueError(f"names in {where} must stay below their folder, got {name!r}")
