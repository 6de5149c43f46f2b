"""What runs on each node of the job: download the inputs, run torchrun, upload the result.

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
from typing import Annotated

from pydantic import Field

from components.core import storage
from components.core.cli import errors_in_one_line, parse, stop_at_sigterm
from components.core.process import run_to_end
from components.core.progress import log
from components.core.reading import parse_json
from components.core.settings import naming
from components.core.storage import check_place

RESULT_PATIENCE = 3600.0  # seconds that a node without a result waits for the one that writes it
POLL_SECONDS = 2.0
UPLOAD_TRIES, UPLOAD_PAUSE = 5, 30.0  # the pause between tries is in seconds
# seconds for which a failed node stays: once it ends, the operator may remove its pod, log and all, before the launcher, which
# looks every three seconds, has read why it failed
LAST_WORDS = 7.0
STOPPED = 128 + signal.SIGTERM
NAME = r"^\w+$"  # of an input: the parameter that gives it


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """Settings of a node."""

    place: str
    """The job's location in the handover: inputs/… is read, result is written."""
    inputs: str
    """Parameter of components.distill → name under inputs/, as a JSON object; parameters may share a name."""
    flags: str
    """All other flags of components.distill, as a JSON list."""

    def __post_init__(self) -> None:
        check_place("place", self.place)
        parse_json(self.inputs, "inputs", dict[str, Annotated[str, Field(pattern=NAME)]])
        parse_json(self.flags, "flags", list[str])


def run(config: NodeConfig) -> None:
    """Run one node's part of the job. Raises SystemExit with torchrun's exit code if it fails."""
    result = f"{config.place}/result"
    if storage.is_complete(result):
        log("the result is there already")
        return
    work = Path(tempfile.mkdtemp(prefix="distill-"))
    inputs = parse_json(config.inputs, "inputs", dict[str, str])
    given = parse_json(config.flags, "flags", list[str])
    for name in sorted(set(inputs.values())):
        storage.download(f"{config.place}/inputs/{name}", work / name)
    paths = {parameter: work / name for parameter, name in inputs.items()} | {"output_dir": work / "result"}
    flags = [*given, *(f"--{parameter}={path}" for parameter, path in paths.items())]
    run_to_end([sys.executable, "-m", "torch.distributed.run", "-m", "components.distill", *flags], os.environ)
    if (work / "result").is_dir():
        hand_over(work / "result", result)
    else:
        wait_for(result)


def hand_over(folder: Path, result: str) -> None:
    """Upload the result, retrying a few times, since a failure here would waste the whole training run."""
    for left in reversed(range(UPLOAD_TRIES)):
        try:
            storage.upload(folder, result)
            return
        except OSError as error:
            if not left:
                raise
            log(f"the result could not be written, {left} tries left: {error}")
            time.sleep(UPLOAD_PAUSE)


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
