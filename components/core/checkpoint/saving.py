"""Write a checkpoint that transformers and inference servers can load."""

import json
import struct
from pathlib import Path
from typing import Any

from components.core.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from components.core.files import write_json


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model and its tokenizer to `folder` so that transformers and inference servers can load it.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, ValueError):
        raise
    except Exception as error:  # libraries written in Rust have errors of their own for a full disk
        raise OSError(f"writing a checkpoint to {folder.parent} failed: {error}") from error
    _write_index(folder)


def _write_index(folder: Path) -> None:
    """Write an index for a single-file checkpoint as well.

    Servers that read `*.safetensors` (vLLM, SGLang) follow the index if there is one, so they never mistake a mask in the
    same folder for weights.
    """
    if (folder / INDEX_FILE).exists():
        return
    with (folder / WEIGHTS_FILE).open("rb") as file:  # a safetensors file starts with the length and the JSON of its header
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    names = [name for name in header if name != "__metadata__"]
    total = sum(header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(names, WEIGHTS_FILE)})
