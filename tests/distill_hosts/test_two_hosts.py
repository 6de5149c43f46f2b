"""Distillation over two hosts, each in its own network namespace, connected by a virtual cable.

What the restart of one host requires, found by killing it:

- `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` for every agent. Without it (torch 2.13) the surviving agent keeps the store of the
  first round and does not announce its address again: the restarted host's agent waits for `MASTER_ADDR`, the survivor for
  the restarted one, and both exit with code 1 after the rendezvous' `read_timeout` of 60 seconds.
- `--max_restarts`: the survivor's worker fails with its peer (gloo: connection reset), which costs its agent one restart.
  The agent itself keeps running and need not be restarted.
- `keep_alive_interval` in `--rdzv_conf`: a dead host is dropped after three intervals, by default 15 seconds, and only then
  does the next round begin.
- `--local_addr`: agents are ranked by address, and a host's name may not resolve to its address on the cable.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.core.mask.file import MASK_FILE
from components.distill.config import DistillConfig
from components.distill.stage import run as distill
from tests.conftest import save_pruned

ROOT = Path(__file__).parents[2]
PORT = 29511
STEPS = 30
PATIENCE = 45  # seconds to wait for anything


def ip(*words, check=True):
    """Run iproute2; return what it printed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Host:
    """A network namespace with one address, and the training process in it."""

    def __init__(self, rank, network, folder):
        self.rank, self.folder = rank, folder
        self.namespace, self.cable = f"distill-{network}-{rank}", f"v{network}{rank}"
        self.address = f"10.77.0.{rank + 1}"
        self.process = None
        self.starts = 0

    def plug_in(self):
        """Give this end of the cable its address."""
        ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", self.cable)
        for device in ("lo", self.cable):
            ip("-n", self.namespace, "link", "set", device, "up")

    def start(self, rendezvous, flags):
        """Start torchrun, with the same command each time, as a cluster's operator would."""
        line = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "torch.distributed.run"]
        line += ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3", "--local_addr", self.address]
        line += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"10.77.0.1:{PORT}", "--rdzv_id", rendezvous]
        # normally the endpoint's host is recognised by its host name, but the namespaces of one machine share one
        line += ["--rdzv_conf", f"is_host={1 - self.rank},join_timeout={PATIENCE},keep_alive_interval=1"]
        line += ["-m", "components.distill", *(f"--{key}={value}" for key, value in flags.items())]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": self.cable,
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.starts += 1

    @property
    def log(self):
        return self.folder / f"host{self.rank}.log"

    def kill(self):
        """SIGKILL every process on this host, as in a power failure."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=20)
        for _ in range(50):  # the workers, and whatever they start meanwhile
            found = ip("netns", "pids", self.namespace, check=False).split()
            if not found:
                break
            for number in found:
                try:
                    os.kill(int(number), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)


@pytest.fixture
def hosts(tmp_path):
    """Two hosts that can reach each other."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    network = uuid.uuid4().hex[:8]
    hosts = [Host(rank, network, tmp_path) for rank in (0, 1)]
    try:
        for host in hosts:
            done = subprocess.run(["ip", "netns", "add", host.namespace], capture_output=True, text=True, timeout=20)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted: {done.stderr.strip()}")
        one, other = hosts
        ends = ["netns", one.namespace, "type", "veth", "peer", "name", other.cable, "netns", other.namespace]
        done = subprocess.run(["ip", "link", "add", one.cable, *ends], capture_output=True, text=True, timeout=20)
        if done.returncode:
            pytest.skip(f"virtual cables are not permitted: {done.stderr.strip()}")
        for host in hosts:
            host.plug_in()
        yield hosts
    finally:
        for host in hosts:
            try:
                host.kill()
            finally:
                ip("netns", "del", host.namespace, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    """A folder with a tiny dense and a tiny pruned model and a single-process run to compare with."""
    folder = tmp_path_factory.mktemp("hosts")
    save_pruned(folder, corpus)
    distill(DistillConfig(**settings(folder, corpus, folder / "one"), batch_size=4))
    return folder


def settings(models, corpus, output):
    """Settings of a run with a global batch of 8 blocks: `batch_size` must be 4 for one process, 2 for two."""
    return {
        "teacher_model": str(models / "dense"),
        "student_model": str(models / "pruned"),
        "mask_file": str(models / "pruned" / MASK_FILE),
        "output_dir": str(output),
        "train_data": str(corpus),
        "eval_data": str(corpus),
        "seq_len": 32,
        "eval_seq_len": 32,
        "eval_blocks": 7,
        "grad_accum_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
    }


def wait(hosts, until, what):
    """Wait for a condition; fail with both logs after `PATIENCE` seconds or when a host fails."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        logs = "\n".join(f"host {host.rank}:\n{host.log.read_text()}" for host in hosts)
        failed = [host.rank for host in hosts if host.process.poll()]
        assert not failed, f"host {failed} failed before {what}\n{logs}"
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s\n{logs}"
        time.sleep(0.1)


def ended(hosts):
    """Whether both hosts succeeded."""
    return all(host.process.poll() == 0 for host in hosts)


def check_like_one(models, output):
    """Check for the same loss curve as with one process, nearly the same weights, and exact zeros."""
    curves = []
    for folder in (models / "one", output):
        stats = json.loads((folder / "distill_stats.json").read_text())
        curves.append([step["loss"] for step in stats["details"]["steps"]])
        assert stats["sparse_integrity_check"]["violations"] == 0
    assert len(curves[0]) == STEPS
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (models / "one", output))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.timeout(110)
def test_two_hosts_are_like_one_process(hosts, models, corpus, tmp_path):
    flags = settings(models, corpus, tmp_path / "out") | {"batch_size": 2, "backend": "fsdp"}
    for host in hosts:
        host.start("plain", flags)
    wait(hosts, lambda: ended(hosts), "the end of the run")
    first, second = (host.log.read_text() for host in hosts)
    assert first.count("[PPL] epoch=1 eval_ppl=") == 1  # only host 0 prints and writes
    assert f"s: {tmp_path / 'out'}" in first
    assert "[PPL]" not in second
    check_like_one(models, tmp_path / "out")


@pytest.mark.timeout(110)
def test_a_host_that_dies_comes_back_and_the_run_goes_on(hosts, models, corpus, tmp_path):
    """The survivor's worker fails with its peer; its agent keeps running, and starts a new worker once the host is back."""
    survivor, victim = hosts
    flags = settings(models, corpus, tmp_path / "out") | {"batch_size": 2, "backend": "fsdp"}
    flags |= {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_steps": 2}
    for host in hosts:
        host.start("restart", flags)
    wait(hosts, lambda: "checkpoint: " in survivor.log.read_text(), "a checkpoint")
    victim.kill()
    assert victim.process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    victim.start("restart", flags)
    wait(hosts, lambda: ended(hosts), "the end of the run")
    assert (survivor.starts, victim.starts) == (1, 2)
    assert "resuming from" in survivor.log.read_text()
    check_like_one(models, tmp_path / "out")
