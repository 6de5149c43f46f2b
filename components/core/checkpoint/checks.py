"""Checkpoint checks that do not read any weights."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from components.core.checkpoint.files import QUANTO_FILE, weight_files


def check_checkpoint(parameter: str, path: str | Path, trust_remote_code: bool = False) -> Any:
    """Check that a folder holds a checkpoint and return its configuration without reading any weights.

    Raises:
        ValueError: the path is not a folder, or has no readable config.json or no safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{parameter} must be a folder with a Hugging Face checkpoint, got {path}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{parameter} must be a folder with a config.json, got {path}")
    if not weight_files(folder):
        raise ValueError(f"{parameter} must hold safetensors weights (pickled ones are never read), got {path}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{parameter} must have a config.json that transformers can read, got {path}: {error}") from error


def check_dense(parameter: str, path: str | Path, config: Any) -> None:
    """Raise `ValueError` if a checkpoint is quantized, since such weights can be neither pruned nor trained."""
    if (Path(path) / QUANTO_FILE).is_file() or getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{parameter} must not be quantized yet, got {path}")


def check_seq_len(parameter: str, seq_len: int, config: Any) -> None:
    """Raise `ValueError` if `seq_len` is larger than the model's number of positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < seq_len:  # XLNet has -1: any number
        raise ValueError(f"{parameter} must be at most the model's {positions} positions, got {seq_len}")
