"""The folder of a run on this machine: who may use it, and which of its stages are complete.

    <stage>-<key>/   a stage's outputs and, once they are complete, `done.json`; the key stands for all that they depend on
    run.log          everything that the stages and `kfp.local` have printed
    run.lock         held by `run.py`; a folder that has it is a run's
    stages.lock      held by the stages too, since they outlive a killed `run.py` by the seconds that they need to end
    tmp/             temporary files

So the same command finds the folders of the stages that are complete, and a stage with other parameters or inputs gets another.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from kfp.dsl import Artifact

import components
from components.core.files import check_new, stat_fingerprint, write_json
from components.core.history import versions
from components.core.progress import log
from components.core.reading import read_json

RUN_LOCK, STAGES_LOCK, TEMPORARY = "run.lock", "stages.lock", "tmp"  # in the run's folder
DONE, CHECKPOINTS, PROGRAM = "done.json", "checkpoints", "component.py"  # in a stage's folder


def check_run_dir(run_dir: Path) -> None:
    """Raise `ValueError` unless the folder can be created, is empty, or holds an earlier run."""
    if not run_dir.is_dir():
        check_new("run_dir", run_dir)
    elif any(run_dir.iterdir()) and not (run_dir / RUN_LOCK).is_file():
        raise ValueError(f"run_dir must not exist yet, or hold a run to go on with, got {run_dir}")


@contextlib.contextmanager
def used_alone(run_dir: Path) -> Iterator[TextIO]:
    """Keep others from using the folder, and provide its `tmp`; yields the lock that each stage must inherit.

    Raises:
        ValueError: another `run.py` uses the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / RUN_LOCK).open("a") as lock, (run_dir / STAGES_LOCK).open("a") as stages_lock:
        if not _lock(lock):
            raise ValueError(f"run_dir must not be used by two run.py at once, another one is running in {run_dir}")
        if not _lock(stages_lock):
            log("waiting for a stage of the run before, which is about to end")
            fcntl.flock(stages_lock, fcntl.LOCK_EX)
        temporary = run_dir / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run has left
        temporary.mkdir()
        try:
            yield stages_lock
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _lock(file: TextIO) -> bool:
    """Lock a file until it is closed here and in every process that has inherited it; False if others have locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def stage_folder(stage: str, program: list[str], arguments: Mapping[str, Any]) -> str:
    """Name of the folder for a stage's outputs, which stands for all that they depend on.

    Args:
        stage: the stage's name.
        program: the command that runs its component.
        arguments: its parameters and input artifacts, by name.
    """
    inputs = {name: _identity(value) for name, value in sorted(arguments.items())}
    parts = json.dumps([program, code_of(stage), versions(), inputs], sort_keys=True)
    return f"{stage}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def _identity(value: Any) -> Any:
    """What distinguishes an input from others: of a folder or file the path, and its files' sizes and times of change."""
    if isinstance(value, list):
        return [_identity(item) for item in value]
    if isinstance(value, Artifact):
        return [value.path, fingerprint(Path(value.path))]
    if isinstance(value, str) and os.path.isfile(value):  # noqa: PTH113 (Path.is_file raises an error for a long text)
        return [value, fingerprint(Path(value))]
    return value


def fingerprint(path: Path) -> str:
    """Changes whenever a file at or below `path` does."""
    return stat_fingerprint([path, *sorted(path.rglob("*"))])


@functools.cache
def code_of(stage: str) -> str:
    """SHA-256 of the source of a stage and of what all stages share."""
    root = Path(components.__file__).parent
    kinds = (".py", ".json", ".j2")
    files = sorted(file for folder in ("core", stage) for file in (root / folder).rglob("*") if file.suffix in kinds)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether a stage has finished here and its outputs are still as it left them."""
    try:
        return read_json(folder / DONE, dict[str, Any]) == {"outputs": _outputs(folder)}
    except (OSError, ValueError):
        return False


def set_complete(folder: Path) -> None:
    """Record that a stage has finished, and remove the checkpoints from which it would have gone on."""
    write_json(folder / DONE, {"outputs": _outputs(folder)})
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _outputs(folder: Path) -> dict[str, str]:
    return {path.name: fingerprint(path) for path in sorted(folder.iterdir()) if path.name not in (DONE, CHECKPOINTS)}


def remove_outputs(folder: Path, outputs: Mapping[str, Any]) -> None:
    """Remove what an earlier try of a stage has left, except what the next one can use.

    Args:
        folder: the stage's folder.
        outputs: the paths that `kfp.local` gave it, from the executor's input.
    """
    (folder / DONE).unlink(missing_ok=True)
    paths = [Path(artifact["uri"]) for entry in outputs.get("artifacts", {}).values() for artifact in entry["artifacts"]]
    paths += [Path(entry["outputFile"]) for entry in outputs.get("parameters", {}).values()]
    paths += [Path(outputs["outputFile"]), *folder.glob("*/.*.partial")]
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_unfinished(run_dir: Path) -> None:
    """Remove what stages left that were killed and then given other parameters; to be called when a run has finished."""
    for folder in [program.parent for program in run_dir.glob(f"*/{PROGRAM}")]:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        if not (folder / DONE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
