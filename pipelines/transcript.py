"""Output of a run on this machine: the terminal gets only the stages' own lines, a log file gets everything.

`kfp.local` surrounds each stage's output with about a hundred lines of headers, executor input as JSON and artifact lists.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from kfp.local import logging_utils

# how the executor's own lines begin; libraries log in the same form, and what they warn of must be seen
EXECUTOR = re.compile(r"\[KFP Executor [^]]* INFO\]: ")
INPUT_BEGINS, INPUT_ENDS = "Got executor_input:", "}"  # the JSON is between these two


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[TextIO]:
    """Append everything that `kfp.local` prints to the file `path`, which is yielded for what the stages print."""
    for name in ("CYAN", "GREEN", "RED", "MAGENTA", "RESET"):
        setattr(logging_utils.Color, name, "")
    with path.open("a", encoding="utf-8", buffering=1) as file, contextlib.redirect_stdout(file):
        # kfp.local sets handlers for each task; of two at a time, the one that ends first would leave the other without
        handler = logging.StreamHandler(file)
        logging.getLogger().addHandler(handler)
        try:
            yield file
        finally:
            logging.getLogger().removeHandler(handler)


def copy(lines: Iterable[str], log: TextIO, terminal: TextIO) -> None:
    """Write a stage's lines to the log as they come, and those that it printed itself to the terminal."""
    for line in own_lines(_written(lines, log)):
        terminal.write(line)
        terminal.flush()


def _written(lines: Iterable[str], file: TextIO) -> Iterator[str]:
    """Yield the lines unchanged, and write each to `file`."""
    for line in lines:
        whole = line if line.endswith("\n") else f"{line}\n"  # the last one
        file.write(whole)
        yield whole


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines that a stage itself printed, without the executor's lines and blank lines."""
    inside_input = False
    for line in lines:
        if inside_input:
            inside_input = line.rstrip() != INPUT_ENDS
        elif EXECUTOR.match(line):
            inside_input = INPUT_BEGINS in line
        elif line.strip():
            yield line
