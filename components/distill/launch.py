"""Start the processes of a run by the launcher that is set, and join them."""

import os
import sys

import torch

from components.core import processes
from components.core.device import pick_device
from components.core.settings import flags_of
from components.distill.config import DistillConfig


def command(config: DistillConfig, cuda: bool) -> list[str]:
    """The command that starts `nproc_per_node` processes of this stage with the same settings.

    Args:
        config: the settings; `launcher` is `torchrun` or `accelerate`.
        cuda: whether they use GPUs.
    """
    count, port, module = config.nproc_per_node, str(config.master_port), "components.distill"
    flags = flags_of(config, DistillConfig)
    if config.launcher == "torchrun":
        # the rendezvous is always on this machine; in a cluster, each node starts torchrun itself
        return processes.torchrun(module, flags, count, "--master_addr", "127.0.0.1", "--master_port", port)
    start = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", str(count)]
    start += ["--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no"]
    if count > 1:
        start += ["--multi_gpu"]  # uses torchrun; without GPUs too, where accelerate would otherwise need MPI
    elif not cuda:
        start += ["--cpu"]
    return [sys.executable, *start, "-m", module, *flags]


def join(config: DistillConfig) -> torch.device:
    """Join the process group, if the backend has one; returns this process's device."""
    device = pick_device(config.gpus)
    if config.backend == "none":
        if processes.process_count() > 1:
            raise ValueError(f"backend must be fsdp or deepspeed for {processes.process_count()} processes, got none")
        return device
    if "RANK" not in os.environ:  # a single process of a distributed backend
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(config.master_port)
    return processes.join(device)
