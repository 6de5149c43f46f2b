"""Kills of pods whose checkpoints are in a bucket: everything on their disks is lost, and training goes on all the same."""

import atexit
import json
import os
import re
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

from components.core.storage.place import open_store
from tests.hostile.harness import CASE_TIMEOUT, Case, Running, flags, free_port
from tests.hostile.lab import Lab
from tests.hostile.outputs import digest, wrong

ROOT = Path(__file__).parents[2]
STEPS = 12  # more than the other kills have, so that most moments are in the middle of training
BUCKET = "s3://bucket"
LOGIN = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
import s3fs
address = "http://{}:{}".format(*server.get_host_and_port())
s3fs.S3FileSystem(endpoint_url=address, key="key", secret="secret").mkdir("bucket")
print(address, flush=True)
threading.Event().wait()
"""


def serve() -> None:
    """Start an object store for all cases of this run, and point the libraries at it."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)
    atexit.register(server.kill)
    assert server.stdout
    os.environ |= LOGIN | {"AWS_ENDPOINT_URL": server.stdout.readline().strip()}


def newest(place: str) -> int:
    """The step of the newest whole checkpoint in a bucket; 0 = there is none."""
    found = [re.search(r"/step-(\d+)/manifest\.json$", name) for name in open_store(place).list()]
    return max((int(match[1]) for match in found if match), default=0)


def resumed(printed: str) -> int:
    """The step from which a run says that it goes on; 0 = from the beginning."""
    match = re.search(r"^resuming from \S*step-(\d+)$", printed, re.MULTILINE)
    return int(match[1]) if match else 0


def lost_pods(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Kills of distillation in one pod."""
    if count:
        serve()
        lab.make("distill", "distilled_longer", max_steps=STEPS)
    for number in range(count):
        yield _pod_case(
            lab, f"{BUCKET}/pod-{number}", random.choice((signal.SIGKILL, signal.SIGTERM)), random.uniform(0.2, 3.5)
        )


def _pod_case(lab: Lab, checkpoints: str, number: signal.Signals, moment: float) -> Case:
    def run(place: Path) -> str | None:
        settings = lab.settings("distill", max_steps=STEPS, checkpoint_dir=checkpoints, checkpoint_steps=2)
        running = Running("components.distill", flags(settings), place)
        time.sleep(moment)
        running.kill(number)
        ended = running.wait()
        if ended.code not in (0, -number, 128 + number):
            return f"exit code {ended.code}: {ended.err[-300:]!r}"
        shutil.rmtree(place / "output", ignore_errors=True)
        whole = newest(checkpoints)
        again = Running("components.distill", flags(settings), place).wait()
        if again.code:
            return f"then exit code {again.code}: {again.err[-300:]!r}"
        if resumed(again.out) != whole:
            return f"it went on from step {resumed(again.out)}, the bucket had {whole}"
        return wrong(lab, "distill", place / "output", {}, "distilled_longer")

    return Case(f"pod: {number.name} after {moment:.2f} s", run)


def lost_nodes(lab: Lab, random: Random, count: int) -> Iterator[Case]:
    """Kills of one of two nodes of a job; the other ends with it, and both are started again on empty disks."""
    if not count:
        return
    folder = lab.root / "nodes"
    (folder / "work").mkdir(parents=True)
    nodes = _start_nodes(lab, folder / "work", str(folder / "result"), f"{BUCKET}/reference")
    for node in nodes:
        printed, _ = node.communicate(timeout=CASE_TIMEOUT)
        assert node.returncode == 0, printed
    for number in range(count):
        yield _nodes_case(lab, number, random.choice((0, 1)), random.uniform(4, 16))


def _start_nodes(lab: Lab, place: Path, result: str, checkpoints: str) -> list[subprocess.Popen[str]]:
    """Two nodes as an operator starts them, each with a disk of its own."""
    settings: dict[str, Any] = lab.settings("distill", max_steps=STEPS, backend="fsdp", launcher="torchrun", batch_size=1)
    inputs = {name: settings.pop(name) for name in ("teacher_model", "student_model", "mask_file", "train_data", "eval_data")}
    del settings["output_dir"]
    settings |= {"checkpoint_dir": checkpoints, "checkpoint_steps": 2, "global_batch": 2}
    command = [sys.executable, "-m", "components.distill_distributed.node", "--result", result]
    command += ["--inputs", json.dumps(inputs), "--flags", json.dumps(flags(settings))]
    told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    nodes = []
    for rank in (0, 1):
        disk = place / f"disk-{rank}"
        disk.mkdir()
        environment = os.environ | told | {"PET_NODE_RANK": str(rank), "TMPDIR": str(disk), "PYTHONPATH": str(ROOT)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes))
    return nodes


def _nodes_case(lab: Lab, number: int, victim: int, moment: float) -> Case:
    def run(place: Path) -> str | None:
        result, checkpoints = str(place / "result"), f"{BUCKET}/nodes-{number}"
        nodes = _start_nodes(lab, place, result, checkpoints)
        time.sleep(moment)
        for node in (nodes[victim], nodes[1 - victim]):
            if node.poll() is None:
                for process in (*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)):
                    process.kill()
            node.communicate(timeout=CASE_TIMEOUT)
        shutil.rmtree(result, ignore_errors=True)
        for rank in (0, 1):
            shutil.rmtree(place / f"disk-{rank}")
        whole = newest(checkpoints)
        nodes = _start_nodes(lab, place, result, checkpoints)
        printed = [node.communicate(timeout=CASE_TIMEOUT)[0] for node in nodes]
        if any(node.returncode for node in nodes):
            return f"then exit codes {[node.returncode for node in nodes]}: {printed[0][-300:]!r} {printed[1][-300:]!r}"
        if max(map(resumed, printed)) != whole:
            return f"it went on from step {max(map(resumed, printed))}, the bucket had {whole}"
        expected, found = digest(lab.root / "nodes" / "result"), digest(place / "result")
        return next((f"{name} is other" for name in expected | found if expected.get(name) != found.get(name)), None)

    return Case(f"nodes: node {victim} lost after {moment:.2f} s", run)
