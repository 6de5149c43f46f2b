"""Folders of files at a place: a bucket or a mounted folder. `place` is what the stages use, the rest are its stores."""

from components.core.storage.place import (
    check_place,
    check_writable,
    download,
    is_complete,
    read_bytes,
    remove,
    upload,
    write_bytes,
)

__all__ = [
    "check_place",
    "check_writable",
    "download",
    "is_complete",
    "read_bytes",
    "remove",
    "upload",
    "write_bytes",
]
