"""Start the processes of a run, and find this process's place among them."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from components.core.device import pick_device
from components.core.process import end_with, run_to_end
from components.distill.config import DistillConfig

STARTED = "DISTILL_STARTED"


def started_already() -> bool:
    """Whether a launcher has started this process: torchrun sets its rank, `start` sets a marker.

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
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that logs and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def processes_here() -> int:
    """How many processes train together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank_here() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_here() -> bool:
    """Whether this process is the first on its machine."""
    return rank_here() == 0


def command(config: DistillConfig, cuda: bool) -> list[str]:
    """The command that starts `nproc_per_node` processes of this stage with the same settings.

    Args:
        config: the settings; `launcher` is `torchrun` or `accelerate`.
        cuda: whether they use GPUs.
    """
    processes, port = str(config.nproc_per_node), str(config.master_port)
    if config.launcher == "torchrun":
        # the rendezvous is always on this machine; in a cluster, each node starts torchrun itself
        start = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", processes]
        start += ["--master_addr", "127.0.0.1", "--master_port", port]
    else:
        start = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", processes]
        start += ["--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no"]
        if config.nproc_per_node > 1:
            start += ["--multi_gpu"]  # uses torchrun; without GPUs too, where accelerate would otherwise need MPI
        elif not cuda:
            start += ["--cpu"]
    return [sys.executable, *start, "-m", "components.distill", *config.flags()]


def start(config: DistillConfig) -> None:
    """Run the processes until they exit, forwarding SIGTERM to them.

    Raises:
        ValueError: there are fewer GPUs than processes, or than there are meant to be.
        SystemExit: they exited with a nonzero code, which becomes the exit code.
    """
    cuda = pick_device(config.gpus).type == "cuda"
    if cuda and config.nproc_per_node > (gpus := torch.cuda.device_count()):
        raise ValueError(f"nproc_per_node must be at most the {gpus} GPUs here, got {config.nproc_per_node}")
    run_to_end(command(config, cuda), os.environ | {STARTED: "1"})


def join(config: DistillConfig) -> torch.device:
    """Join the process group; returns this process's device."""
    device = pick_device(config.gpus)
    if config.backend == "none":
        if process_count() > 1:
            raise ValueError(f"backend must be fsdp or deepspeed for {process_count()} processes, got none")
        return device
    if "RANK" not in os.environ:  # a single process of a distributed backend
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(config.master_port)
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
