"""Objects as files in a folder on a mounted volume."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.core.files import PARTIAL, new_file
from components.core.storage.base import WORKERS, Held

PIECE = 2**20  # bytes that are copied at once


class FolderStore:
    """See `components.core.storage.base.Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> dict[str, Held]:
        """See `Store`."""
        held = {}
        for folder, below, names in os.walk(self.root):  # unlike Path.rglob, it goes on when a folder disappears
            below[:] = [name for name in below if not name.endswith(PARTIAL)]  # what others are writing just now
            for path in (Path(folder, name) for name in names if not name.endswith(PARTIAL)):
                with contextlib.suppress(FileNotFoundError):
                    held[path.relative_to(self.root).as_posix()] = Held(path.stat().st_size, None)
        return held

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        for name in files:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        _each(lambda name: _write_over(files[name], self.root / name), files)

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

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`. A hard link appears with its whole content and never replaces a file."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            scratch.write_bytes(data)
            os.link(scratch, target)
        except FileExistsError:
            return False
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`; folders that become empty are removed too."""
        paths = [self.root / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in sorted({folder for path in paths for folder in path.parents}, reverse=True):
            if folder.is_relative_to(self.root):
                with contextlib.suppress(OSError):  # not empty, or already removed by another process
                    folder.rmdir()


def _write_over(source: Path, target: Path) -> None:
    """Copy a file without emptying the target first: another process may be writing or reading the same bytes there."""
    with source.open("rb") as read, os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as written:
        shutil.copyfileobj(read, written, PIECE)
        written.truncate()


def _each(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Do `work` for every name, several at once; stop at the first error."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(work, names):
            pass
