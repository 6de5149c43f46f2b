"""A small disk that tests fill up."""

import subprocess
from pathlib import Path


class SmallDisk:
    """A disk of a given size, mounted at a new folder while the block runs; only root may mount one.

    Args:
        folder: the folder, which is created.
        size: bytes, or a number with a unit as `mount` takes it, such as `128k`.

    Raises:
        OSError: this process may not mount a disk.
    """

    def __init__(self, folder: Path, size: int | str) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount(f"size={size}")

    def _mount(self, options: str) -> None:
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder], check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            raise OSError(error.stderr.decode()) from error

    def enlarge(self, size: int | str) -> None:
        """Give the disk another size, keeping what is on it."""
        self._mount(f"remount,size={size}")

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)
