"""Processes that torchrun starts: how they add up and share what they have, and how one that fails ends them all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from components.core.processes import torchrun

ROOT = Path(__file__).parents[3]

# what the processes of a test run; `work()` is the test's own part, and runs in the group
PROGRAM = """
import os, signal, sys, time
import torch
from components.core import processes
from components.core.cli import errors_in_one_line, stop_at_sigterm

{work}

if __name__ == "__main__":
    with errors_in_one_line():
        stop_at_sigterm()
        processes.end_with_launcher()
        if processes.started_already():
            processes.join(torch.device("cpu"))
            work(processes.rank())
            processes.leave()
        else:
            flags = ["--standalone", "--local_addr", "127.0.0.1"]
            processes.start(processes.torchrun("program", [], 2, *flags), 2, torch.device("cpu"))
            print("all have ended", flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Start two processes that run some work, given as the source of `work(rank)`."""
    started = []

    def run(work: str) -> subprocess.Popen:
        (tmp_path / "program.py").write_text(PROGRAM.format(work=work))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-m", "program"], env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                one.kill()


def test_processes_add_up_and_share(start):
    process = start("""
def work(rank):
    assert processes.from_all({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    total = torch.tensor([1.0, 2.0]) * (rank + 1)
    processes.add_up(total, 1)
    assert rank == 0 or total.tolist() == [3.0, 6.0]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.bool):
        tensor = torch.eye(3).to(dtype) if rank == 1 else torch.zeros(3, 3, dtype=dtype)
        processes.spread(tensor, 1)
        assert torch.equal(tensor, torch.eye(3).to(dtype))
    with processes.together():
        pass
""")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out == "all have ended\n"


@pytest.mark.parametrize(
    ("fault", "code", "line"),
    [
        ('raise ValueError("nsamples must be larger")', 2, "error: nsamples must be larger\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, "error: process 1 was ended by SIGKILL\n"),
    ],
)
def test_a_process_that_fails_ends_all_in_one_line(start, fault, code, line):
    """The first one cleans up, and is not interrupted."""
    begun = time.monotonic()
    process = start(f"""
def work(rank):
    try:
        with processes.together():
            if rank == 1:
                {fault}
    finally:
        if rank == 0:
            time.sleep(1)
            print("cleaned up", flush=True)
""")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (code, "cleaned up\n", line)
    assert time.monotonic() - begun < 55  # the others wait for a minute to be ended


def test_a_fault_of_the_program_has_one_traceback(start):
    process = start("""
def work(rank):
    with processes.together():
        assert rank == 0, "a bug"
""")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("Traceback") == 1
    assert err.endswith("AssertionError: a bug\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(start, number):
    process = start("""
def work(rank):
    with processes.together():
        os.write(1, b"works\\n")  # in one piece
        time.sleep(60)
""")
    assert [process.stdout.readline() for _ in range(2)] == ["works\n"] * 2
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 3
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert err == ""


def test_the_command_names_program_and_place():
    line = torchrun("components.prune", ["--sparsity=0.5"], 4, "--standalone")
    assert line[1:] == [
        *("-m", "components.core.torchrun", "--nnodes", "1", "--nproc_per_node", "4", "--standalone"),
        *("-m", "components.prune", "--sparsity=0.5"),
    ]
