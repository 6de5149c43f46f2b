"""What is left of prune and quantize when they are killed: `kill -9` at a random moment, and the same command again.

    python tests/benchmarks/interruptions.py --output_dir /tmp/interruptions

Prints for each kill how many blocks were finished. Exits with 1 if a run that was killed leaves another folder than one that
was not, or does a finished block again. Every file must be equal to the byte, and of the records all but times and memory.
A kill comes some time after a random number of blocks is finished, so that it meets the stage at work on a busy machine too.
"""

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.cli import parse
from components.core.files import FINISHED, check_new
from components.core.history import HISTORY_FILE, stats_file
from tests.benchmarks.models import make_model

TEXT = ["--nsamples", "4", "--seq_len", "64", "--refit", "2"]
EVALUATION = ["--eval_blocks", "4", "--eval_seq_len", "64", "--eval_data", "builtin:python-docs"]
RECORDS = (HISTORY_FILE, stats_file("*"))
VARYING = ("seconds", "peak_memory_bytes", "output_dir")  # of a record
GOING_ON = re.compile(r"going on after the (\d+) blocks")


@dataclass(frozen=True, kw_only=True)
class InterruptionsConfig:
    """Settings of the benchmark."""

    output_dir: str
    """Folder to create; needs about 2 GB of disk."""
    kills: int = 20
    """Kills of each stage."""
    layers: int = 8
    """Depth of the model."""
    seed: int = 0
    """Of the moments."""

    def __post_init__(self) -> None:
        check_new("output_dir", self.output_dir)


def contents(folder: Path) -> dict[str, str]:
    """Path within a folder → what each file holds: its SHA-256, or of a record the text without what varies."""
    records = {file for pattern in RECORDS for file in folder.glob(pattern)}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): json.dumps(without_varying(json.loads(file.read_text())))
        if file in records
        else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def without_varying(value: Any) -> Any:
    """A record's JSON without what varies from run to run."""
    if isinstance(value, dict):
        return {key: without_varying(part) for key, part in value.items() if key not in VARYING}
    return [without_varying(part) for part in value] if isinstance(value, list) else value


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """The files that differ, are missing or are new; empty if there are none."""
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return f"other content: {', '.join(names)}" if names else ""


def finished(output: Path) -> int:
    """How many blocks a stage that works at `output` has finished."""
    return sum(1 for place in output.parent.glob(f".{output.name}.*") for _ in place.rglob(FINISHED))


def interrupted(command: list[str], output: Path, after: int, delay: float, wanted: dict[str, str]) -> str:
    """Kill a stage some seconds after so many blocks are finished, and start it again; returns what was wrong, or nothing."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and finished(output) < after:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    blocks, whole = finished(output), output.exists()
    print(f"  killed with {'the model' if whole else f'{blocks} blocks'} finished", flush=True)
    if not whole:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        told = GOING_ON.findall(ended.stdout)
        if sum(map(int, told)) != blocks:
            return f"{blocks} blocks were finished, and it went on after {told}"
    return difference(contents(output), wanted)


def main() -> None:
    """Measure both stages."""
    config = parse(InterruptionsConfig)
    place, chance = Path(config.output_dir), random.Random(config.seed)
    make_model(place / "dense", config.layers, vocabulary=1024)
    calibration = ["--calibration_data", "builtin:python-docs", *TEXT]
    inputs = {
        "prune": ["--dense_model", str(place / "dense"), *calibration],
        "quantize": ["--model_dir", str(place / "prune")],
    }
    faults = 0
    for stage, flags in inputs.items():
        command = [sys.executable, "-m", f"components.{stage}", *flags, *EVALUATION, "--output_dir"]
        start = time.monotonic()
        subprocess.run([*command, str(place / stage)], stdout=subprocess.DEVNULL, check=True)
        seconds, wanted = time.monotonic() - start, contents(place / stage)
        print(f"{stage}: {seconds:.1f} s undisturbed", flush=True)
        for number in range(config.kills):
            output = place / f"{stage}-{number}"
            delay = chance.uniform(0, seconds / (config.layers + 1))
            if fault := interrupted([*command, str(output)], output, chance.randint(0, config.layers), delay, wanted):
                faults += 1
                print(f"  {fault}", flush=True)
            shutil.rmtree(output)
        print(f"{stage}: {config.kills} kills, {faults} faults so far", flush=True)
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    main()
