"""What runs on each node of the job: read the inputs at their places, run torchrun, write the result to its places.

Inputs are downloaded once per node, not once per process. Only the node with the first process has a result to upload; the
others wait until it is complete, since an elastic job counts as succeeded, and its pods are removed, when any node finishes.
"""

import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from components.core import storage
from components.core.cli import errors_in_one_line, parse, stop_at_sigterm
from components.core.errors import shown
from components.core.mask.file import MASK_FILE
from components.core.process import run_to_end
from components.core.progress import log
from components.core.reading import parse_json
from components.core.settings import naming
from components.core.storage import check_place

RESULT_PATIENCE = 3600.0  # seconds that a node without a result waits for the one that writes it
POLL_SECONDS = 2.0
# seconds for which a failed node stays: once it ends, the operator may remove its pod, log and all, before the launcher, which
# looks every three seconds, has read why it failed
LAST_WORDS = 7.0
STOPPED = 128 + signal.SIGTERM
REQUIRED = {"teacher_model", "student_model", "mask_file", "train_data"}


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Settings of a node."""

    inputs: str
    """Parameter of components.distill → place to read it from, as a JSON object; parameters may share a place."""
    result: str
    """Place to write the distilled model to."""
    result_mask: str = ""
    """Place to write a folder with its mask to; empty = in the model's folder."""
    flags: str
    """All other flags of components.distill, as a JSON list."""

    def __post_init__(self) -> None:
        check_place("result", self.result)
        if self.result_mask:
            check_place("result_mask", self.result_mask)
        inputs = parse_json(self.inputs, "inputs", dict[str, str])
        for name in REQUIRED - inputs.keys():
            raise ValueError(f"inputs must have {', '.join(sorted(REQUIRED))}, got none for {name}")
        for name, place in inputs.items():
            if not name.isidentifier():
                raise ValueError(f"inputs must have names of parameters, got {shown(name)}")
            check_place(f"inputs.{name}", place)
        parse_json(self.flags, "flags", list[str])


def run(config: NodeConfig) -> None:
    """Run one node's part of the job. Raises SystemExit with the exit code of the process that failed, if one does."""
    if storage.is_complete(config.result):
        log("the result is there already")
        return
    storage.check_writable("result", config.result)
    work = Path(tempfile.mkdtemp(prefix="distill-"))
    inputs = parse_json(config.inputs, "inputs", dict[str, str])
    folders = {place: work / f"input-{number}" for number, place in enumerate(sorted(set(inputs.values())))}
    for place, folder in folders.items():
        storage.download_artifact(place, folder)
    paths = {parameter: folders[place] for parameter, place in inputs.items()} | {"output_dir": work / "result"}
    if config.result_mask:
        paths["output_mask_file"] = work / "mask" / MASK_FILE
    flags = [*parse_json(config.flags, "flags", list[str]), *(f"--{parameter}={path}" for parameter, path in paths.items())]
    command = [sys.executable, "-m", "components.core.torchrun", "-m", "components.distill", *flags]
    run_to_end(command, os.environ)
    if (work / "result").is_dir():
        if config.result_mask:  # before the model, whose being there tells all that the job is done
            storage.complete(work / "mask", config.result_mask)
        storage.upload(work / "result", config.result)
    else:
        wait_for(config.result)


def wait_for(result: str) -> None:
    """Wait until another node has written the result. Raises ValueError if that takes too long."""
    start = time.monotonic()
    while not storage.is_complete(result):
        if time.monotonic() - start > RESULT_PATIENCE:
            raise ValueError(f"no other node wrote {result} within {RESULT_PATIENCE:.0f} s")
        time.sleep(POLL_SECONDS)


def main() -> None:
    """Run one node."""
    stop_at_sigterm()
    config = parse(NodeConfig, "One node of a distillation job.")
    try:
        with errors_in_one_line(), naming(config):
            run(config)
    except SystemExit as end:
        if end.code != STOPPED:
            time.sleep(LAST_WORDS)
        raise


if __name__ == "__main__":
    main()
