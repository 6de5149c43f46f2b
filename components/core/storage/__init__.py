"""Folders of files in a bucket or a mounted folder. The stages use `place`; the other modules are its stores."""

from components.core.storage.place import (
    check_place,
    check_whole,
    check_writable,
    complete,
    create_bytes,
    download,
    is_complete,
    read_bytes,
    remove,
    upload,
    write_bytes,
)

__all__ = [
    "check_place",
    "check_whole",
    "check_writable",
    "complete",
    "create_bytes",
    "download",
    "is_complete",
    "read_bytes",
    "remove",
    "upload",
    "write_bytes",
]
