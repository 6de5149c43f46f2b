"""Objects as files in a folder on a mounted volume."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.core.files import new_file
from components.core.storage.base import WORKERS, Held


class FolderStore:
    """See `components.core.storage.base.Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> dict[str, Held]:
        """See `Store`."""
        paths = self.root.rglob("*")
        return {path.relative_to(self.root).as_posix(): Held(path.stat().st_size, None) for path in paths if path.is_file()}

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        for name in files:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        _each(lambda name: shutil.copyfile(files[name], self.root / name), files)

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

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`; folders that become empty are removed too."""
        paths = [self.root / name for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in sorted({folder for path in paths for folder in path.parents}, reverse=True):
            if folder.is_relative_to(self.root):
                with contextlib.suppress(OSError):  # not empty, or already removed by another process
                    folder.rmdir()


def _each(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Do `work` for every name, several at once; stop at the first error."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(work, names):
            pass
