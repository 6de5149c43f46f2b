"""Several processes of one stage: how they are started, find their places, and share what they have.

Each runs the same program with the same settings. What the launcher gives them (RANK, WORLD_SIZE, LOCAL_RANK) tells them apart.
A process that runs alone may call everything here too, and is then the first of one.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from components.core.process import STARTED, end_with, run_to_end

T = TypeVar("T")

TOLD = (ValueError, OSError, ImportError)  # errors that a user is told in one line, see `components.core.cli`
PATIENCE = 60.0  # seconds that a process waits for its launcher to end it, once another has failed


def started_already() -> bool:
    """Whether a launcher has started this process: torchrun sets its rank, `run_to_end` sets a marker.

    accelerate sets no rank for a single process; without the marker such a child would endlessly start new children.
    """
    return "RANK" in os.environ or STARTED in os.environ


def end_with_launcher() -> None:
    """Have this process end when the launcher that `start` started has died.

    torchrun puts its processes into groups of their own, so killing its group would leave them running.
    """
    if STARTED in os.environ:
        end_with(os.getppid())


def process_count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that logs and writes for all."""
    return rank() == 0


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_here() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_here() -> bool:
    """Whether this process is the first on its machine."""
    return rank_here() == 0


def torchrun(module: str, flags: Sequence[str], processes: int, *rendezvous: str) -> list[str]:
    """The command that starts processes on this machine.

    Args:
        module: what each of them runs.
        flags: its command line.
        processes: how many.
        rendezvous: torchrun's flags that say where they meet.
    """
    count = ["--nnodes", "1", "--nproc_per_node", str(processes)]
    return [sys.executable, "-m", "components.core.torchrun", *count, *rendezvous, "-m", module, *flags]


def start(command: Sequence[str], processes: int, device: torch.device) -> None:
    """Run a launcher of processes until they exit, forwarding SIGTERM to it. They share the threads that the container may use.

    Args:
        command: the launcher's command line.
        processes: how many there will be.
        device: what `pick_device` has found; each of them will find one of this type.

    Raises:
        ValueError: there are fewer GPUs than processes.
        SystemExit: they exited with a nonzero code, which becomes the exit code.
    """
    if device.type == "cuda" and processes > (gpus := torch.cuda.device_count()):
        raise ValueError(f"nproc_per_node must be at most the {gpus} GPUs here, got {processes}")
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    run_to_end(command, threads | os.environ)


def join(device: torch.device) -> torch.device:
    """Join the process group; returns this process's device of this type."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # others wait while the first process saves; the default 10 minutes are too short for a large model on a slow disk
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return device


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_all(value: T) -> list[T]:
    """The values of all processes, on every process; they can be anything that pickles."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * process_count()
    with exchange():
        dist.all_gather_object(values, value)
    return values


def add_up(tensor: Tensor, process: int) -> None:
    """Add up a tensor of all processes, in place, in one of them; in the others its content is undefined afterwards."""
    if dist.is_initialized():
        with exchange():
            dist.reduce(tensor, dst=process)


def average(tensor: Tensor) -> None:
    """Replace a tensor by the mean of those of all processes, in place."""
    if dist.is_initialized():
        with exchange():
            dist.all_reduce(tensor)
        tensor /= process_count()


def spread(tensor: Tensor, process: int) -> None:
    """Copy a contiguous tensor, of any number format, from one process to all, in place."""
    if dist.is_initialized():
        with exchange():
            dist.broadcast(tensor.view(torch.uint8), src=process)


@contextlib.contextmanager
def exchange() -> Iterator[None]:
    """Exchange data in the block. If another process has ended, wait until the launcher notices, and ends this one too."""
    try:
        yield
    except RuntimeError:  # a lost connection
        wait_for_the_end()
        raise


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Have the block end in the same way in all processes, so that none waits for one that has failed.

    No data may be exchanged in it. If it fails for a reason that a user is told, the first process raises the error, whichever
    process it was in, and so says it once. The others wait until the launcher ends them.

    Raises:
        Exception: that of the block, in any process.
    """
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    is_told = isinstance(fault, TOLD)
    faults = [each for each in from_all(fault if is_told or not fault else RuntimeError()) if each]
    if not faults:
        return
    if is_main() and not fault and isinstance(faults[0], TOLD):
        raise faults[0]
    if fault and (is_main() or not is_told):
        raise fault
    wait_for_the_end()
    raise SystemExit(2)


def wait_for_the_end() -> None:
    """Leave it to another process to say what is wrong, and to clean up; the launcher then ends this one.

    Processes of several machines do not wait: their launchers would learn of the end of one by that of the others.
    """
    if STARTED in os.environ:
        time.sleep(PATIENCE)
