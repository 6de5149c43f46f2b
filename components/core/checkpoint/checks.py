"""Checkpoint checks that do not read any weights."""

import contextlib
import errno
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from components.core.checkpoint.files import QUANTO_FILE, stored_tensors
from components.core.errors import readable, shown
from components.core.history import read_history
from components.core.reading import read_json

# what a model may have for each tensor or number that is stored; more is a mistake in config.json, and would take for ever
MODULES_PER_TENSOR, NUMBERS_PER_NUMBER = 8, 2
NUMBERS_PER_PACKED = 16  # for each of a quantized checkpoint, which may store eight in one
FEW = 1000  # modules that any model may have


def check_checkpoint(parameter: str, path: str | Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint; checks and errors as in `inspect_checkpoint`."""
    return inspect_checkpoint(parameter, path, trust_remote_code)[0]


def inspect_checkpoint(parameter: str, path: str | Path, trust_remote_code: bool = False) -> tuple[Any, nn.Module]:
    """Check that a folder holds a checkpoint, without reading any weights.

    Returns:
        (its configuration, its model on the meta device, to inspect names and shapes).

    Raises:
        ValueError: the path is not a folder, has no readable config.json or no safetensors weights, its configuration is not
            that of a causal language model of the weights' size, or its history is damaged.
        OSError: a file cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{parameter} must be a folder with a Hugging Face checkpoint, got {path}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{parameter} must be a folder with a config.json, got {path}")
    for file in folder.iterdir():
        if file.is_file() and not os.access(file, os.R_OK):  # of which libraries would say that it does not exist
            raise PermissionError(errno.EACCES, f"{parameter} holds a file that may not be read", str(file))
    stored = stored_tensors(folder)
    if not stored:
        raise ValueError(f"{parameter} must hold safetensors weights (pickled ones are never read), got {path}")
    read_history(folder)
    if trust_remote_code:
        check_code(parameter, folder)
    with readable(f"{parameter} must have a config.json that transformers can read, got {path}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with _at_most_modules(MODULES_PER_TENSOR * len(stored) + FEW):
        model = empty_model(parameter, config, trust_remote_code)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if numbers > held * (NUMBERS_PER_PACKED if is_quantized(folder, config) else NUMBERS_PER_NUMBER):
        raise ValueError(f"{parameter} must have a config.json that fits its {held} numbers, got one for {numbers}: {path}")
    return config, model


def check_code(parameter: str, folder: Path) -> None:
    """Raise ValueError if a checkpoint would run code of another repository, of which nothing says which version it is."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            auto_map = read_json(folder / name, dict[str, Any]).get("auto_map")
            for value in tree_leaves(auto_map):
                if isinstance(value, str) and "--" in value:
                    raise ValueError(f"{parameter} must bring its own code, auto_map in {folder / name} names {shown(value)}")


def empty_model(parameter: str, config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build a model from its configuration without allocating its weights, to inspect names and shapes.

    Raises:
        ValueError: transformers cannot build it.
    """
    what = f"{parameter} must have a config.json from which a model can be built"
    with readable(what), warnings.catch_warnings(action="ignore"), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


@contextlib.contextmanager
def _at_most_modules(most: int) -> Iterator[None]:
    """Raise ValueError as soon as a model that is being built has more modules and parameters than this."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"it describes a model of more than {most} modules")

    hooks = register_module_module_registration_hook(hook), register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def is_quantized(folder: Path, config: Any) -> bool:
    """Whether the weights of a checkpoint are quantized."""
    return (folder / QUANTO_FILE).is_file() or getattr(config, "quantization_config", None) is not None


def check_dense(parameter: str, path: str | Path, config: Any) -> None:
    """Raise `ValueError` if a checkpoint is quantized, since such weights can be neither pruned nor trained."""
    if is_quantized(Path(path), config):
        raise ValueError(f"{parameter} must not be quantized yet, got {path}")


def check_seq_len(parameter: str, seq_len: int, config: Any) -> None:
    """Raise `ValueError` if `seq_len` is larger than the model's number of positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < seq_len:  # XLNet has -1: any number
        raise ValueError(f"{parameter} must be at most the model's {positions} positions, got {seq_len}")


def check_ids(parameter: str, ids: Tensor, config: Any) -> None:
    """Raise `ValueError` if token ids are not those of words of the model, as with a tokenizer of another model."""
    words = config.get_text_config().vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < words:
        raise ValueError(f"{parameter} must have token ids below the model's {words} words, got {ids.min()} to {ids.max()}")
