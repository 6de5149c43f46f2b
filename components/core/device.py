"""Choose the device and the number format."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from components.core.checkpoint.files import stored_tensors
from components.core.progress import log

# a number format, as safetensors names it → the formats that hold each of its numbers
HELD_BY = {
    "F32": {torch.float32},
    "F16": {torch.float16, torch.float32},
    "BF16": {torch.bfloat16, torch.float32},
}


# where a container finds the CPU time that it may use in a period: version 2 of cgroups, then version 1
QUOTA_FILES = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def pick_device(gpus: int) -> torch.device:
    """The first CUDA device if there is one, otherwise the CPU; its threads are as many as this container may use.

    torch would start one for every CPU of the machine, and a pod with 4 of 96 would mostly wait for its turn.

    Args:
        gpus: how many GPUs there are meant to be; 0 = compute on the CPU, `ANY_GPUS` = whatever is there.

    Raises:
        ValueError: fewer are there, as when a driver is lost: on the CPU the work would take hours without a word.
    """
    visible = visible_gpus()
    if gpus > visible:
        raise ValueError(f"gpus must be at most the {visible} GPUs that can be used here, got {gpus}")
    allowed = cpu_quota()
    if allowed and allowed < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(allowed)
    return torch.device("cuda" if visible and gpus else "cpu")


def visible_gpus() -> int:
    """How many GPUs can be used here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of an accelerator in bytes.

    Attributes:
        used: by this process's tensors.
        peak: the most that they have used since the peak was last reset.
        usable: what they could use: what is free, and what this process has reserved.
    """

    used: int
    peak: int
    usable: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a device; None for the CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.accelerator.get_memory_info(device)
    return DeviceMemory(
        used=torch.accelerator.memory_allocated(device),
        peak=torch.accelerator.max_memory_allocated(device),
        usable=free + torch.accelerator.memory_reserved(device),
    )


def cpu_quota() -> int | None:
    """How many CPUs the container may use, rounded up; None = all of the machine's."""
    for files in QUOTA_FILES:
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
            if int(quota) > 0:
                return math.ceil(int(quota) / int(period))
        except (OSError, ValueError):  # not this version, or `max`
            continue
    return None


def fast_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The number format in which text that only guides a computation may be multiplied; None = that of the weights.

    It is bfloat16 for the `dtype` setting `auto` on a CPU that multiplies it natively, twice as fast as float32.
    """
    native = torch.cpu.get_capabilities()
    if dtype == "auto" and device.type == "cpu" and (native.get("avx512_bf16") or native.get("amx_bf16")):
        return torch.bfloat16
    return None


@contextlib.contextmanager
def factors_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, float32 matrix products on a CPU round their factors to bfloat16 if `dtype` is that, and add up in float32."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # it is put there when the module is imported
    before = products.fp32_precision
    if dtype == torch.bfloat16:
        products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def pick_dtype(dtype: str, device: torch.device, folder: str | Path) -> torch.dtype:
    """The torch dtype for a `dtype` setting; says so if it does not hold all that a checkpoint stores.

    Args:
        dtype: the setting. `auto` is bfloat16 where the device has it, float16 on other GPUs, and float32 on a CPU.
        device: where the model runs.
        folder: its checkpoint.
    """
    picked = getattr(torch, dtype, None)
    if dtype == "auto":
        picked = torch.float32
        if device.type == "cuda":
            picked = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    assert isinstance(picked, torch.dtype)
    kinds = {tensor.dtype for tensor in stored_tensors(Path(folder)).values()}
    if rounded := sorted(kind for kind in kinds & HELD_BY.keys() if picked not in HELD_BY[kind]):
        name = str(picked).removeprefix("torch.")
        log(f"dtype {dtype}: weights that are stored as {', '.join(rounded)} are rounded to {name}")
    return picked
