"""What is left of prune and quantize when they are killed: `kill -9` at random moments, and the same command again.

    python tests/benchmarks/interruptions.py --output_dir /tmp/interruptions

Prints for each kill how many blocks were finished. Exits with 1 if a run that was killed ends with other bytes than one that
was not, or does a finished block again.
"""

import hashlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse
from components.core.files import FINISHED, check_new
from tests.benchmarks.models import make_model

TEXT = ["--nsamples", "4", "--seq_len", "64", "--refit", "2"]
EVALUATION = ["--eval_blocks", "4", "--eval_seq_len", "64", "--eval_data", "builtin:python-docs"]
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


def digests(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of each file with tensors."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def interrupted(command: list[str], output: Path, moment: float, wanted: dict[str, str]) -> str:
    """Kill a stage after some seconds and start it again; returns what was wrong, or nothing."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    blocks = sum(1 for place in output.parent.glob(f".{output.name}.*") for _ in place.rglob(FINISHED))
    whole = output.exists()
    print(f"  killed after {moment:.1f} s with {'the model' if whole else f'{blocks} blocks'} finished", flush=True)
    if not whole:
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        told = GOING_ON.findall(ended.stdout)
        if sum(map(int, told)) != blocks:
            return f"{blocks} blocks were finished, and it went on after {told}"
    return "" if digests(output) == wanted else "other bytes"


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
        seconds, wanted = time.monotonic() - start, digests(place / stage)
        print(f"{stage}: {seconds:.1f} s undisturbed", flush=True)
        for number in range(config.kills):
            output = place / f"{stage}-{number}"
            if fault := interrupted([*command, str(output)], output, chance.uniform(0.2, 1) * seconds, wanted):
                faults += 1
                print(f"  {fault}", flush=True)
            shutil.rmtree(output)
        print(f"{stage}: {config.kills} kills, {faults} faults so far", flush=True)
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    main()
