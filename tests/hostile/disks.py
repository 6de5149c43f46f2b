"""Full disks: a stage writes to a disk that is too small by a random amount."""

import functools
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.harness import Case, Kind, Running, flags, leftovers, refusal
from tests.hostile.kills import VARIANTS
from tests.hostile.lab import Lab
from tests.hostile.outputs import REFERENCE, wrong
from tests.small_disk import SmallDisk

# the last is all that torch lets a full disk be known by in some places
FULL = ("No space left", "File too large", "of disk", "os error 28", "os error 27", "could not be written")


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a small disk; if not, the size of files is limited instead."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with SmallDisk(Path(folder) / "disk", 4096):
                return True
        except OSError:
            return False


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Full disks, half of the sizes around what the stage needs."""
    for _ in range(count):
        stage = random.choice(list(REFERENCE))
        changes = random.choice(VARIANTS.get(stage, [{}]))
        needed = sum(file.stat().st_size for file in (lab.root / REFERENCE[stage]).rglob("*") if file.is_file())
        size = int(needed * random.choice((random.random(), random.uniform(0.8, 1.2), random.uniform(1, 4))))
        yield _case(lab, stage, changes, max(size, 4096))


def _case(lab: Lab, stage: str, changes: dict[str, Any], size: int) -> Case:
    def run(place: Path) -> str | None:
        if not can_mount():
            return _run(lab, stage, changes, place, size)
        with SmallDisk(place / "disk", size) as disk:
            return _run(lab, stage, changes, disk.folder, None)

    return Case(f"{stage}: {' '.join(flags(changes))} on {size} bytes", run)


def _run(lab: Lab, stage: str, changes: dict[str, Any], place: Path, limit: int | None) -> str | None:
    os.chdir(place)

    def limited() -> None:
        os.environ["TMPDIR"] = str(place)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = flags(lab.settings(stage, **changes))
    ended = Running(f"components.{stage}", command, place, before=limited).wait()
    os.chdir(place.parent)
    output = place / ("place" if stage == "publish" else "output")
    if ended.code == 0:
        return wrong(lab, stage, output, changes)
    if fault := refusal(ended, *FULL):
        return fault
    if stage == "publish":
        return "the pointer was moved" if (output / "latest.json").exists() else None
    return leftovers(place, "checkpoints", unfinished=True)


KIND = Kind(cases, whole=420, short=20)
