"""What a walk has finished, in a folder that outlives a killed process."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from components.core.files import FINISHED, write_json
from components.core.processes import from_all, is_main, together
from components.core.progress import log
from components.core.reading import read_json
from components.core.walk.activations import Activations

PIECE = 2**20  # bytes of a file that are read at a time


class Finished(TypedDict):
    """A finished block, as JSON: its result, and the checksums of its files and of the activations after it."""

    result: dict[str, Any]
    files: dict[str, int]
    activations: dict[str, int]


def work_key(depends_on: Mapping[str, Any]) -> str:
    """A short name for a piece of work, made from everything that its result depends on (as JSON)."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]


class Work:
    """The finished blocks of a walk.

    A block's files are written first; then a small file with their checksums says that the block is finished. If a machine died
    before they reached its disk, the checksums tell, and the walk begins anew.

    Attributes:
        results: what is known of each finished block.

    Args:
        folder: where they are kept; created if it does not exist.
        what: the work, for messages.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []
        found: list[Finished] = []
        while (file := self._file(len(found))).is_file():
            found.append(read_json(file, Finished))
        if not found:
            return
        sums = {name: value for block in found for name, value in block["files"].items()} | found[-1]["activations"]
        if all(checksum(folder / name) == value for name, value in sums.items()):
            self.results = [block["result"] for block in found]
            log(f"{what}: going on after the {len(found)} blocks that a process has finished before it ended")
            return
        log(f"{what}: the work of a process that was killed is damaged, so it begins anew")
        for number in range(len(found)):
            self._file(number).unlink()

    def commit(self, result: dict[str, Any], files: Iterable[Path] = (), activations: Iterable[Activations] = ()) -> None:
        """Say that the next block is finished.

        Args:
            result: what is to be known of it, as JSON.
            files: its files, in the folder, which stay as they are.
            activations: those after this block, which are kept until the next block is finished.
        """
        sums = {file.name: checksum(file) for file in files}
        states = {entry.file.name: entry.checksum for entry in activations}
        write_json(self._file(len(self.results)), Finished(result=result, files=sums, activations=states))
        self.results.append(result)

    def _file(self, number: int) -> Path:
        return self.folder / FINISHED.replace("*", f"{number:05d}")


class SharedWork(Work):
    """The finished blocks of processes that walk together, each with hidden states of its own.

    The first process reads and writes for all; what is damaged for one begins anew for all. Every process calls every method.
    """

    def __init__(self, folder: Path, what: str) -> None:
        with together():
            if is_main():
                super().__init__(folder, what)
        self.folder, self.results = from_all((folder, self.results if is_main() else []))[0]

    def commit(self, result: dict[str, Any], files: Iterable[Path] = (), activations: Iterable[Activations] = ()) -> None:
        """See `Work`; the activations are those of this process."""
        everywhere = [entry for entries in from_all(list(activations)) for entry in entries]
        with together():
            if is_main():
                super().commit(result, files, everywhere)
            else:
                self.results.append(result)


def checksum(file: Path) -> int:
    """CRC-32 of a file; 0 if there is none."""
    total = 0
    if file.is_file():
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                total = zlib.crc32(piece, total)
    return total
