"""Write a checkpoint such that transformers and inference servers load it."""

import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from components.core.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from components.core.files import write_json


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer into `folder`, such that transformers and servers load it.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"writing weights to {folder.parent} failed: {error}") from error
    tokenizer.save_pretrained(folder)
    _write_index(folder)


def _write_index(folder: Path) -> None:
    """Give a single-file checkpoint an index as well.

    Servers that read `*.safetensors` (vLLM, SGLang) go by the index where there is one, so that a mask in the same
    folder is never taken for weights.
    """
    if (folder / INDEX_FILE).exists():
        return
    with (folder / WEIGHTS_FILE).open("rb") as file:  # a safetensors file opens with its header's length and JSON
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    names = [name for name in header if name != "__metadata__"]
    total = sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, WEIGHTS_FILE)})
