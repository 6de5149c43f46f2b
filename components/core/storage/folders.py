"""Folders of files at a place.

A folder is stored as it is, one object per file, and `complete.json`, written last, lists every file with its size and CRC-32C.
An interrupted upload therefore has no `complete.json` and is never mistaken for a complete one, and every byte that is
downloaded is checked. Empty folders are not stored. KFP stores an artifact in the same way, but without `complete.json`.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from components.core.files import check_new, new_directory
from components.core.progress import log
from components.core.storage.base import Held, Store
from components.core.storage.listing import COMPLETE, check_held, check_name, checksum, checksums, parse
from components.core.storage.place import check_place, open_store


def upload(folder: Path, place: str) -> None:
    """Copy a folder to a place, replacing whatever an earlier attempt left there.

    Args:
        folder: the source; holds at least one file and no `complete.json`.
        place: the destination; must not be complete yet.

    Raises:
        ValueError: the place, or one below it, is already complete, or an object differs from what was sent.
        OSError: the place could not be written to, after the client library's retries.
    """
    check_place("place", place)
    files = _files(folder)
    if is_complete(place):
        raise ValueError(f"place must not be complete yet, got {place}")
    store = open_store(place)
    rest = store.list()
    if whole := [name for name in rest if name.endswith(f"/{COMPLETE}")]:
        raise ValueError(f"place must not hold other places that are complete, got {place} with {whole[0]}")
    store.delete(rest)
    _send(files, store, place)


def complete(folder: Path, place: str) -> None:
    """Bring a place to hold a folder, whatever of it is there already, complete and damaged or not at all.

    Nothing is deleted on the way, and what is right stays right: several processes may do so at once with the same files, while
    others read them.

    Raises:
        ValueError, OSError: as for `upload`, but the place may be complete.
    """
    check_place("place", place)
    _send(_files(folder), open_store(place), place)


def _files(folder: Path) -> dict[str, Path]:
    """All files of a folder to upload, by name."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files or COMPLETE in files:
        raise ValueError(f"folder must hold files, none of them {COMPLETE}, got {folder}")
    return files


def _send(files: dict[str, Path], store: Store, place: str) -> None:
    """Write files, check what the store reports about them, and write `complete.json` last."""
    with _measured("uploaded", place, [path.stat().st_size for path in files.values()]):
        sums = checksums(files)
        store.put(files)
        check_held(store, place, sums)
        store.write(COMPLETE, json.dumps({"files": {name: held._asdict() for name, held in sums.items()}}, indent=2).encode())


def download(place: str, folder: Path) -> None:
    """Copy a folder that `upload` stored to a new local folder, which appears complete or not at all.

    Args:
        place: the source.
        folder: the folder to be created.

    Raises:
        ValueError: the place is not complete, an object is missing or differs, or the folder exists.
        OSError: the place could not be read, after the client library's retries.
    """
    check_place("place", place)
    store = open_store(place)
    sums = _uploaded(store, place)
    check_held(store, place, sums)
    _receive(store, place, sums, folder)


def download_artifact(place: str, folder: Path) -> None:
    """Copy an artifact that KFP or `upload` stored to a new local folder, which appears whole or not at all.

    KFP takes an artifact for whole once its task has succeeded. Sizes are checked, and checksums where the store knows them.

    Raises:
        ValueError: there is nothing, an object differs, or the folder exists.
        OSError: the place could not be read, after the client library's retries.
    """
    check_place("place", place)
    store = open_store(place)
    held = store.list()
    if COMPLETE in held:
        download(place, folder)
        return
    if not held:
        raise ValueError(f"place must hold an artifact, there is nothing at {place}")
    for name in held:
        check_name(name, place)
    _receive(store, place, held, folder)


def _uploaded(store: Store, place: str) -> dict[str, Held]:
    """What `complete.json` says was uploaded to a place. Raises ValueError if the place is not complete."""
    try:
        return parse(store.read(COMPLETE), place)
    except FileNotFoundError as error:
        raise ValueError(f"place must be complete, {place} is not complete: it has no {COMPLETE}") from error


def _receive(store: Store, place: str, expected: Mapping[str, Held], folder: Path) -> None:
    """Copy objects to a new folder and check that they are as expected."""
    sizes = [held.size for held in expected.values()]
    check_new("folder", folder, sum(sizes))
    with _measured("downloaded", place, sizes), new_directory(folder) as scratch:
        files = {name: scratch / name for name in expected}
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        store.get(files)
        for name, found in checksums(files).items():
            wanted = expected[name]
            if found.size != wanted.size or wanted.crc32c not in (None, found.crc32c):
                raise ValueError(f"{place}/{name} must be what was stored, {wanted}, got {found}")


def is_complete(place: str) -> bool:
    """Whether an upload to the place has been completed."""
    check_place("place", place)
    try:
        open_store(place).read(COMPLETE)
    except FileNotFoundError:
        return False
    return True


def check_complete(place: str) -> None:
    """Check that a place is complete, and that the store reports every file as it was uploaded, without reading any.

    Raises:
        ValueError: it is not complete, or an object is missing or differs.
        OSError: the place could not be read, after the library's retries.
    """
    check_place("place", place)
    store = open_store(place)
    check_held(store, place, _uploaded(store, place))


def check_whole(place: str) -> None:
    """Check that a complete place still holds every file as it was uploaded.

    Raises:
        ValueError: an object is missing, or differs in size or checksum; names it.
        OSError: the place could not be read, after the library's retries.
    """
    check_place("place", place)
    store = open_store(place)
    sums = parse(store.read(COMPLETE), place)
    there = check_held(store, place, sums)
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in sums if there[name].crc32c is None):  # where the store does not know it, one by one
            copy = Path(folder) / "object"
            store.get({name: copy})
            if (found := checksum(copy)) != sums[name]:
                raise ValueError(f"{place}/{name} must be what {COMPLETE} says, {sums[name]}, got {found}")


@contextlib.contextmanager
def _measured(what: str, place: str, sizes: list[int]) -> Iterator[None]:
    """Log how much was transferred and how fast, if the block succeeds."""
    start = time.monotonic()
    yield
    seconds, megabytes = time.monotonic() - start, sum(sizes) / 1e6
    log(f"{what} {place}: {len(sizes)} files, {megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.0f} MB/s")
