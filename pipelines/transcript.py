"""Output of a run on this machine: the terminal gets only the stages' own lines, a log file gets everything.

`kfp.local` surrounds each stage's output with about a hundred lines of headers, executor input as JSON and artifact lists.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from kfp.local import logging_utils, subprocess_task_handler

# how the executor's own lines begin; libraries log in the same form, and what they warn of must be seen
EXECUTOR = re.compile(r"\[KFP Executor [^]]* INFO\]: ")
INPUT_BEGINS, INPUT_ENDS = "Got executor_input:", "}"  # the JSON is between these two


@contextlib.contextmanager
def transcript(path: Path, terminal: TextIO) -> Iterator[None]:
    """Write everything that `kfp.local` prints to the file `path`, and what the stages themselves print to `terminal`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("CYAN", "GREEN", "RED", "MAGENTA", "RESET"):
        setattr(logging_utils.Color, name, "")
    with path.open("w", encoding="utf-8", buffering=1) as file, contextlib.redirect_stdout(file):

        def run_stage(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
            """Replaces the function with which `kfp.local` runs a stage; several stages may run in parallel."""
            stage = full_command[full_command.index("--function_to_execute") + 1]
            terminal.write(f"== {stage}\n")
            terminal.flush()
            with subprocess.Popen(
                full_command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | (env_vars or {}),
            ) as process:
                assert process.stdout
                for line in own_lines(_written(process.stdout, file)):
                    terminal.write(line)
                    terminal.flush()
            return process.returncode

        original = subprocess_task_handler.run_local_subprocess
        subprocess_task_handler.run_local_subprocess = run_stage
        try:
            yield
        finally:
            subprocess_task_handler.run_local_subprocess = original


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
