"""Kills: a stage, or a group of processes, ends at a random moment; the same command then ends as if nothing had happened."""

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.harness import Case, Kind, Running, flags, leftovers
from tests.hostile.lab import Lab
from tests.hostile.outputs import wrong

# stage → seconds that it takes, roughly
STAGES = {"fetch": 0.2, "tokenize": 0.25, "prune": 0.5, "distill": 0.6, "quantize": 0.5, "report": 0.3, "publish": 0.25}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "prune": [{}, {"mask_file": "mask.safetensors"}],
    "distill": [{}, {"checkpoint_dir": "checkpoints", "checkpoint_steps": 1}, {"teacher_cache": "always"}],
    "publish": [{"version": "v1"}],
}
MAY_STAY = ("output", "mask.safetensors", "checkpoints", "place")


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Kills of single stages."""
    for _ in range(count):
        name = random.choice(list(STAGES))
        changes = random.choice(VARIANTS.get(name, [{}]))
        number = random.choice((signal.SIGKILL, signal.SIGTERM))
        yield _case(lab, name, changes, number, random.uniform(0, 1.3) * STAGES[name])


def _case(lab: Lab, stage: str, changes: dict[str, Any], number: signal.Signals, moment: float) -> Case:
    def run(place: Path) -> str | None:
        command = flags(lab.settings(stage, **changes))
        running = Running(f"components.{stage}", command, place)
        time.sleep(moment)
        running.kill(number)
        ended = running.wait()
        if ended.code not in (0, -number, 128 + number):
            return f"exit code {ended.code}: {ended.err[-300:]!r}"
        if "Traceback" in ended.err:
            return f"traceback: {ended.err[-300:]!r}"
        output = place / ("place" if stage == "publish" else "output")
        if output.exists() and stage != "publish" and (fault := wrong(lab, stage, output, changes)):
            return f"a half-written output: {fault}"
        if ended.code == 128 + number and (fault := leftovers(place, *MAY_STAY)):
            return fault
        if output.exists() and stage != "publish":
            shutil.rmtree(output)
            (place / "mask.safetensors").unlink(missing_ok=True)
        again = Running(f"components.{stage}", command, place).wait()
        if again.code != 0:
            return f"then exit code {again.code}: {again.err[-300:]!r}"
        return wrong(lab, stage, output, changes) or leftovers(place, *MAY_STAY)

    return Case(f"{stage}: {' '.join(flags(changes))} {number.name} after {moment:.3f} s", run)


KIND = Kind(cases, whole=500, short=20)
