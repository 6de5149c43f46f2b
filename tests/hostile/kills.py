"""Kills: a stage, or a group of processes, ends at a random moment; the same command then ends as if nothing had happened."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.hostile.buckets import lost_nodes, lost_pods
from tests.hostile.harness import CASE_TIMEOUT, Case, Kind, Running, flags, free_port, leftovers
from tests.hostile.lab import EVALUATION, Lab
from tests.hostile.outputs import wrong

ROOT = Path(__file__).parents[2]
# stage → seconds that it takes, roughly
STAGES = {"fetch": 0.2, "tokenize": 0.25, "prune": 0.5, "distill": 0.6, "quantize": 0.5, "report": 0.3, "publish": 0.25}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "prune": [{}, {"mask_file": "mask.safetensors"}, {"allocation": "search"}],
    "distill": [{}, {"checkpoint_dir": "checkpoints", "checkpoint_steps": 1}, {"teacher_cache": "always"}],
    "publish": [{"version": "v1"}],
}
# two processes that train, and two that prune
TRAINING = {
    "launcher": "torchrun",
    "nproc_per_node": 2,
    "checkpoint_dir": "checkpoints",
    "checkpoint_steps": 1,
    "batch_size": 1,
}
GROUPS: list[tuple[str, dict[str, Any]]] = [
    ("distill", TRAINING | {"backend": "fsdp"}),
    ("distill", TRAINING | {"backend": "deepspeed"}),
    ("prune", {"nproc_per_node": 2}),
]
MAY_STAY = ("output", "mask.safetensors", "checkpoints", "place")


def cases(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Kills of single stages, and in the whole suite of groups of processes and of whole runs."""
    others = count // 65
    yield from _runs(lab, random, others)
    yield from _groups(lab, random, others)
    pods = max(count // 52, 1)
    yield from lost_pods(lab, random, pods)
    yield from lost_nodes(lab, random, count // 104)
    for _ in range(count - 2 * others - pods - count // 104):
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
        if ended.code == 128 + number and (fault := leftovers(place, *MAY_STAY, unfinished=True)):
            return fault
        if output.exists() and stage != "publish":
            shutil.rmtree(output)
            (place / "mask.safetensors").unlink(missing_ok=True)
        again = Running(f"components.{stage}", command, place).wait()
        if again.code != 0:
            return f"then exit code {again.code}: {again.err[-300:]!r}"
        return wrong(lab, stage, output, changes) or leftovers(place, *MAY_STAY)

    return Case(f"{stage}: {' '.join(flags(changes))} {number.name} after {moment:.3f} s", run)


def _groups(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Kills of processes that torchrun started, of the stage that started it, and of all at once."""
    for number in range(count):
        stage, changes = GROUPS[number % len(GROUPS)]
        whom = random.choice(("launcher", "worker", "all"))
        signal_number = signal.SIGTERM if whom == "launcher" and random.random() < 0.5 else signal.SIGKILL
        yield _group_case(lab, stage, changes, whom, signal_number, random.uniform(1, 25))


def _group_case(lab: Lab, stage: str, changes: dict[str, Any], whom: str, number: signal.Signals, moment: float) -> Case:
    def run(place: Path) -> str | None:
        def start() -> subprocess.Popen[str]:
            port = {"master_port": free_port()} if stage == "distill" else {}
            command = [sys.executable, "-m", f"components.{stage}", *flags(lab.settings(stage, **changes, **port))]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)

        def fault() -> str | None:
            return _equal(lab, place) if stage == "distill" else wrong(lab, stage, place / "output", {}, "pruned_by_two")

        first = start()
        time.sleep(moment)
        family = (
            [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)] if first.poll() is None else []
        )
        chosen = {"launcher": family[:1], "worker": family[-1:], "all": family}[whom]
        for process in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        said, _ = first.communicate(timeout=CASE_TIMEOUT)
        _, alive = psutil.wait_procs(family, timeout=60)
        for process in alive:
            process.kill()
        if alive:
            return f"{len(alive)} processes went on"
        if first.returncode == 0 and (place / "output").exists():
            return fault()
        if number == signal.SIGTERM and first.returncode not in (0, -15, 143):
            return f"exit code {first.returncode}: {said[-500:]!r}"
        if (place / "output").exists():
            return fault()
        second = start()
        said, _ = second.communicate(timeout=CASE_TIMEOUT)
        if second.returncode:
            return f"then exit code {second.returncode}: {said[-500:]!r}"
        return fault() or leftovers(place, "output", "checkpoints")

    return Case(f"torchrun: {stage}: {' '.join(flags(changes))} {number.name} to {whom} after {moment:.1f} s", run)


def _equal(lab: Lab, place: Path) -> str | None:
    """Two processes add up in another order than one, so the weights are close instead of equal."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (place / "output", lab.root / "distilled"))
    largest = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    zeros = all(torch.equal(ours[name] == 0, theirs[name] == 0) for name in theirs)
    return None if largest < 1e-4 and zeros else f"weights differ by {largest}, zeros are {'the same' if zeros else 'others'}"


def _runs(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Kills of `pipelines/run.py`."""
    for _ in range(count):
        yield _run_case(lab, random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)), random.uniform(2, 60))


def _run_case(lab: Lab, number: signal.Signals, moment: float) -> Case:
    def run(place: Path) -> str | None:
        (place / "tmp").mkdir()
        settings = {
            "model_id": lab.path("dense"),
            "train_data": lab.path("corpus"),
            "eval_data": lab.path("corpus"),
            "nsamples": 4,
            "seq_len": 32,
            "distill_max_steps": 4,
            "distill_batch_size": 2,
            "distill_grad_accum_steps": 1,
            "distill_learning_rate": 1e-3,
            "quantize_formats": ["int8"],
            "run_dir": str(place / "run"),
            **EVALUATION,
        }
        command = [sys.executable, str(ROOT / "pipelines" / "run.py"), *flags(settings)]
        environment = os.environ | {"TMPDIR": str(place / "tmp")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        first = subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)
        time.sleep(moment)
        family = psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []
        first.send_signal(number)
        _, said = first.communicate(timeout=CASE_TIMEOUT)
        if first.returncode not in (0, -number, 128 + number) or "Traceback" in said:
            return f"exit code {first.returncode}: {said[-500:]!r}"
        _, alive = psutil.wait_procs(family, timeout=60)
        if alive:
            return f"{len(alive)} processes went on"
        if number != signal.SIGKILL and (fault := leftovers(place / "tmp")):
            return fault
        second = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if second.returncode:
            return f"then exit code {second.returncode}: {second.stdout[-300:]}{second.stderr[-500:]!r}"
        (distilled,) = (place / "run").glob("distill-*/*/distilled_model")
        return wrong(lab, "distill", distilled, {}) or leftovers(place / "tmp")

    return Case(f"run.py: {number.name} after {moment:.1f} s", run)


KIND = Kind(cases, whole=520, short=20)
