"""Folders of files and small objects in a bucket or a mounted folder. The stages use what is listed here."""

from components.core.storage.folders import (
    check_complete,
    check_whole,
    complete,
    download,
    download_artifact,
    is_complete,
    upload,
)
from components.core.storage.place import (
    check_place,
    check_writable,
    create_bytes,
    is_bucket,
    read_bytes,
    remove,
    remove_leftovers,
    write_bytes,
)
from components.core.storage.session import current_session, run_place, use_session, use_store_of

__all__ = [
    "check_complete",
    "check_place",
    "check_whole",
    "check_writable",
    "complete",
    "create_bytes",
    "current_session",
    "download",
    "download_artifact",
    "is_bucket",
    "is_complete",
    "read_bytes",
    "remove",
    "remove_leftovers",
    "run_place",
    "upload",
    "use_session",
    "use_store_of",
    "write_bytes",
]
