"""Choose the device and the number format."""

import torch


def pick_device() -> torch.device:
    """The first CUDA device if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype for a `dtype` setting: `auto` is float16 on a GPU and float32 on a CPU."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    picked = getattr(torch, dtype)
    assert isinstance(picked, torch.dtype)
    return picked
