"""Places: a bucket with a prefix, or a mounted folder; single small objects there, and whether one can write there.

A place is `gs://bucket/prefix`, `s3://bucket/prefix`, `minio://bucket/prefix` or an absolute folder path. Credentials come from
where the client libraries look for them: Application Default Credentials for gs://; AWS_ACCESS_KEY_ID and related variables, or
a role, for s3://; for minio://, the same, after MINIO_ACCESS_KEY and MINIO_SECRET_KEY. The bucket of a pipeline's own artifacts
is reached as KFP says, see `session`.
"""

import importlib
import re
import tempfile
import uuid
from pathlib import Path, PurePosixPath

from components.core.errors import shown
from components.core.progress import log
from components.core.storage.base import Store
from components.core.storage.folder import FolderStore
from components.core.storage.listing import COMPLETE
from components.core.storage.persistent import PersistentStore

_BUCKETS = {  # scheme: module of its store, extra that installs it
    "gs": ("components.core.storage.gcs", "gcs"),
    "s3": ("components.core.storage.s3", "s3"),
    "minio": ("components.core.storage.s3", "s3"),
}


def is_bucket(place: str) -> bool:
    """Whether a place is in a bucket, not a folder."""
    return "://" in place


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
        if not is_bucket(place):
            _check_writable_folder(Path(place))
            return
        store, name = open_store(place), f".writable-{uuid.uuid4().hex}"
        store.write(name, b"")
        store.delete([name])
    except (ValueError, OSError) as error:
        raise ValueError(f"{parameter} must be a place that can be written, got {place}: {error}") from error


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


def remove_leftovers(place: str) -> None:
    """Delete everything under a place that nothing needs any more; a failure is only told, since the work itself is done."""
    try:
        remove(place)
        log(f"{place} removed")
    except (OSError, ValueError) as error:
        log(f"{place} could not be removed, what is left there must be removed by hand: {error}")


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
    return PersistentStore(store)


def _check_writable_folder(folder: Path) -> None:
    """Write an unnamed temporary file to the deepest folder on the path that exists."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"x")
