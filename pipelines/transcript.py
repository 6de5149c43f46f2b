"""What a run on this machine prints: the stages' own lines go to the terminal, everything goes to a file.

`kfp.local` surrounds each stage with headers, the executor's input as JSON and lists of artifacts, a hundred lines a stage.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from kfp.local import logging_utils, subprocess_task_handler

EXECUTOR = "[KFP Executor"  # begins the executor's own lines
INPUT_BEGINS, INPUT_ENDS = "Got executor_input:", "}"  # between them stands the JSON


@contextlib.contextmanager
def transcript(path: Path, terminal: TextIO) -> Iterator[None]:
    """Let `kfp.local` write all it has to say to the file `path`, and to `terminal` what the stages themselves print."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("CYAN", "GREEN", "RED", "MAGENTA", "RESET"):
        setattr(logging_utils.Color, name, "")
    with path.open("w", encoding="utf-8", buffering=1) as file, contextlib.redirect_stdout(file):

        def run_stage(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
            """Takes the place of the function by which `kfp.local` runs a stage; several may run at once."""
            stage = full_command[full_command.index("--function_to_execute") + 1]
            terminal.write(f"== {stage}\n")
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
    """The lines, each of which is written to a file on the way."""
    for line in lines:
        file.write(line)
        yield line


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    """What a stage itself prints: not the executor's lines, nor blank ones."""
    inside_input = False
    for line in lines:
        if inside_input:
            inside_input = line.rstrip() != INPUT_ENDS
        elif line.startswith(EXECUTOR):
            inside_input = INPUT_BEGINS in line
        elif line.strip():
            yield line
