"""Load a model in a packed format."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from components.core.checkpoint.checks import check_checkpoint
from components.core.checkpoint.files import PACKED_METHOD
from components.core.checkpoint.loading import load_model
from components.core.errors import shown


def load_packed(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model in a packed format, unpacked to dense weights, one tensor at a time; all checksums are compared.

    Args:
        folder: the checkpoint.
        dtype: number format of the weights.
        device: where they go.
        trust_remote_code: run code that comes with the model.

    Returns:
        an ordinary model of transformers, in evaluation mode.

    Raises:
        ValueError: the folder is not a packed checkpoint, is damaged, lacks tensors of its model or has others.
    """
    config = check_checkpoint("folder", folder, trust_remote_code)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method != PACKED_METHOD:
        raise ValueError(f"folder must hold a model in a packed format, {folder} has quant_method {shown(method)}")
    return load_model(folder, dtype, torch.device(device), trust_remote_code)
