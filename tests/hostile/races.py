"""Races: two processes do the same, or contradict each other, at the same time."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.harness import Case, Ended, Kind, Running, flags, leftovers, refusal
from tests.hostile.kills import STAGES
from tests.hostile.lab import Lab
from tests.hostile.outputs import wrong


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Pairs of processes, the second started a random moment after the first."""
    for _ in range(count):
        later = random.choice((0, random.uniform(0, 0.1), random.uniform(0, 0.5)))
        kind = random.choice(("same output", "same version", "other content", "same checkpoints", "same cache"))
        if kind == "same output":
            yield _same_output(lab, random.choice([name for name in STAGES if name != "publish"]), {}, later)
        elif kind == "same cache":
            yield _same_output(lab, "distill", {"teacher_cache": "always"}, later)
        elif kind == "same checkpoints":
            yield _same_checkpoints(lab, later)
        else:
            yield _same_version(lab, kind == "same version", later)


def _pair(place: Path, later: float, *commands: tuple[str, dict[str, Any]]) -> list[Ended]:
    running = []
    for stage, settings in commands:
        running.append(Running(f"components.{stage}", flags(settings), place))
        time.sleep(later)
    return [process.wait() for process in running]


def _one_well(ended: list[Ended], *names: str) -> str | None:
    """Exactly one of them ends well; the other is refused."""
    well = [one for one in ended if one.code == 0]
    if len(well) != 1:
        return f"{len(well)} ended well: {[one.err[-300:] for one in ended]}"
    return next((refusal(one, *names) for one in ended if one.code), None)


def _same_output(lab: Lab, stage: str, changes: dict[str, Any], later: float) -> Case:
    def run(place: Path) -> str | None:
        command = stage, lab.settings(stage, **changes)
        fault = _one_well(_pair(place, later, command, command), "output")
        return fault or wrong(lab, stage, place / "output", changes) or leftovers(place, "output")

    return Case(f"{stage}: two with one output_dir {changes}, {later:.3f} s apart", run)


def _same_checkpoints(lab: Lab, later: float) -> Case:
    def run(place: Path) -> str | None:
        changes = {"checkpoint_dir": "checkpoints", "checkpoint_steps": 1, "max_steps": 4}
        commands = [("distill", lab.settings("distill", output_dir=name, **changes)) for name in ("first", "second")]
        ended = _pair(place, later, *commands)
        well = [name for name, one in zip(("first", "second"), ended, strict=True) if one.code == 0]
        if not well:
            return f"none ended well: {[one.err[-300:] for one in ended]}"
        for name in well:
            if fault := wrong(lab, "distill", place / name, changes):
                return fault
        faults = [refusal(one, "checkpoint_dir") for one in ended if one.code]
        return next(filter(None, faults), None) or leftovers(place, "checkpoints", *well)

    return Case(f"distill: two with one checkpoint_dir, {later:.3f} s apart", run)


def _same_version(lab: Lab, same: bool, later: float) -> Case:
    def run(place: Path) -> str | None:
        settings = lab.settings("publish", version="v1", publish_to=str(place / "place"))
        other = settings if same else settings | {"models": [lab.path("fp8")]}
        ended = _pair(place, later, ("publish", settings), ("publish", other))
        if same:
            if failed := [one.err[-300:] for one in ended if one.code]:
                return f"one failed: {failed}"
            return wrong(lab, "publish", place / "place", {})
        if fault := _one_well(ended, "version"):
            return fault
        published = sorted(path.name for path in (place / "place" / "v1").iterdir())
        if published != ["complete.json", "fp8" if ended[0].code else "int8", "report", "version.json"]:
            return f"a mixture: {published}"
        again = Running("components.publish", flags(other if ended[0].code else settings), place).wait()
        shutil.rmtree(place / "place")
        return None if again.code == 0 else f"then {again.err[-300:]}"

    return Case(f"publish: two of one version, {'the same' if same else 'other'} content, {later:.3f} s apart", run)


KIND = Kind(cases, whole=100, short=10)
