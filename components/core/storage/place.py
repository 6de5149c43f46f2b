"""Folders of files at a place: a bucket or a mounted folder.

A place is `gs://bucket/prefix`, `s3://bucket/prefix`, `minio://bucket/prefix` or an absolute folder path. A folder is stored
there as it is, one object per file, and `complete.json`, written last, lists every file with its size and CRC-32C. An
interrupted upload therefore has no `complete.json` and is never mistaken for a complete one, and every byte that is downloaded
is checked. Empty folders are not stored. Credentials come from where the client libraries look for them: Application Default
Credentials for gs://; AWS_ACCESS_KEY_ID and related variables, or a role, for s3://; for minio://, the same, after
MINIO_ACCESS_KEY and MINIO_SECRET_KEY.
"""

import contextlib
import importlib
import json
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from components.core.errors import shown
from components.core.files import check_new, new_directory
from components.core.progress import log
from components.core.storage.base import Store
from components.core.storage.folder import FolderStore
from components.core.storage.listing import COMPLETE, check_held, checksum, checksums, parse

_BUCKETS = {  # scheme: module of its store, extra that installs it
    "gs": ("components.core.storage.gcs", "gcs"),
    "s3": ("components.core.storage.s3", "s3"),
    "minio": ("components.core.storage.s3", "s3"),
}


def check_place(parameter: str, place: str) -> None:
    """Check the syntax of a place without contacting a server.

    Args:
        parameter: name of the setting, for the error message.
        place: the value to check.

    Raises:
        ValueError: it is not a valid place.
    """
    scheme, found, path = place.partition("://")
    parts = path.split("/") if found else place.split("/")[1:]
    bucket_is_fit = scheme in _BUCKETS and re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", parts[0]) and len(parts) > 1
    fit = bucket_is_fit if found else place.startswith("/")
    if not fit or not all(
        part not in ("", ".", "..") and part.isprintable() and not set(part) & set("\\*?#[]") for part in parts
    ):
        schemes = ", ".join(f"{scheme}://bucket/prefix" for scheme in _BUCKETS)
        raise ValueError(f"{parameter} must be one of {schemes} or an absolute folder path, got {shown(place)}")


def check_writable(parameter: str, place: str) -> None:
    """Write and delete a small object, so that a missing bucket or permission is reported before any heavy work.

    Args:
        parameter: name of the setting, for the error message.
        place: where output will be written later.

    Raises:
        ValueError: the place is invalid or not writable.
    """
    check_place(parameter, place)
    try:
        if "://" not in place:
            _check_writable_folder(Path(place))
            return
        store, name = open_store(place), f".writable-{uuid.uuid4().hex}"
        store.write(name, b"")
        store.delete([name])
    except (ValueError, OSError) as error:
        raise ValueError(f"{parameter} must be a place that can be written, got {place}: {error}") from error


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
    try:
        sums = parse(store.read(COMPLETE), place)
    except FileNotFoundError as error:
        raise ValueError(f"place must be complete, {place} is not complete: it has no {COMPLETE}") from error
    sizes = [held.size for held in sums.values()]
    check_new("folder", folder, sum(sizes))
    check_held(store, place, sums)
    with _measured("downloaded", place, sizes), new_directory(folder) as scratch:
        files = {name: scratch / name for name in sums}
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        store.get(files)
        for name, held in checksums(files).items():
            if held != sums[name]:
                raise ValueError(f"{place}/{name} must be what {COMPLETE} says, {sums[name]}, got {held}")


def is_complete(place: str) -> bool:
    """Whether an upload to the place has been completed."""
    check_place("place", place)
    try:
        open_store(place).read(COMPLETE)
    except FileNotFoundError:
        return False
    return True


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


def write_bytes(place: str, data: bytes) -> None:
    """Write one small object, replacing any earlier one."""
    check_place("place", place)
    parent, _, name = place.rpartition("/")
    open_store(parent).write(name, data)


def create_bytes(place: str, data: bytes) -> bool:
    """Write one small object unless it exists; returns whether it was written. Of several at once, one succeeds."""
    check_place("place", place)
    parent, _, name = place.rpartition("/")
    return open_store(parent).create(name, data)


def read_bytes(place: str) -> bytes:
    """Read one small object.

    Raises:
        FileNotFoundError: it does not exist.
    """
    check_place("place", place)
    parent, _, name = place.rpartition("/")
    return open_store(parent).read(name)


def remove(place: str) -> None:
    """Delete everything under a place, every `complete.json` first, so that nothing counts as complete after a failure."""
    check_place("place", place)
    store = open_store(place)
    store.delete(sorted(store.list(), key=lambda name: PurePosixPath(name).name != COMPLETE))


def open_store(place: str) -> Store:
    """The store for a place; imports only the client library for its scheme."""
    scheme, found, path = place.partition("://")
    if not found:
        return FolderStore(Path(place))
    module, extra = _BUCKETS[scheme]
    bucket, _, prefix = path.partition("/")
    try:
        store: Store = importlib.import_module(module).open_store(scheme, bucket, prefix)
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs pip install 'sparse-distill[{extra}]': {error}") from error
    return store


def _check_writable_folder(folder: Path) -> None:
    """Write an unnamed temporary file to the deepest folder on the path that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"x")


@contextlib.contextmanager
def _measured(what: str, place: str, sizes: list[int]) -> Iterator[None]:
    """Log how much was transferred and how fast, if the block succeeds."""
    start = time.monotonic()
    yield
    seconds, megabytes = time.monotonic() - start, sum(sizes) / 1e6
    log(f"{what} {place}: {len(sizes)} files, {megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.0f} MB/s")
