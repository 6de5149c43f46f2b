"""Choose the device and the number format."""

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


def pick_device() -> torch.device:
    """The first CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
