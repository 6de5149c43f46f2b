"""Write a checkpoint that transformers and inference servers can load, in parts that are joined at the end.

A safetensors file is the length of its header, the header (JSON: each tensor's type, shape and place), and the data. So files
are joined by writing a new header and copying the data, without reading any tensor.
"""

import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.dynamic_module_utils import custom_object_save

from components.core.checkpoint.files import INDEX_FILE, WEIGHTS_FILE
from components.core.files import new_file, write_json

SHARD_BYTES = 2 * 10**9  # of a file that is made of several parts
METADATA = "__metadata__"
ALIGNMENT = 64  # bytes, of where the data begins


def part_file(folder: Path, number: int) -> Path:
    """The file of a part of the weights: 0 for what lies outside the blocks, then one for each block."""
    return folder / f"weights-{number:05d}.safetensors"


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # its own error for a full disk
        raise OSError(f"writing {path} failed: {error}") from error


def parameters_outside(model: Any, blocks: nn.ModuleList) -> dict[str, Tensor]:
    """Name → tensor of all that a checkpoint stores of a model outside its blocks; of tied weights, the main one."""
    inside = {id(tensor) for tensor in blocks.state_dict(keep_vars=True).values()}
    left_out = {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}
    everything = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in everything.items() if id(tensor) not in inside and name not in left_out}


def finish_checkpoint(model: Any, tokenizer: Any, parts: Iterable[Path], dtype: torch.dtype, folder: Path) -> None:
    """Write all of a checkpoint to its folder: its weights, joined from their parts, its configuration and its tokenizer.

    Args:
        model: the model; its weights need not be loaded.
        tokenizer: its tokenizer.
        parts: files of the weights, which are copied and stay.
        dtype: the number format of the weights.
        folder: where to write.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        model.config.dtype = str(dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        if model.is_remote_code():
            custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, ValueError):
        raise
    except Exception as error:  # libraries written in Rust have errors of their own for a full disk
        raise OSError(f"writing a checkpoint to {folder.parent} failed: {error}") from error
    write_weights(list(parts), folder)


def write_weights(parts: list[Path], folder: Path) -> None:
    """Join parts to one file if they are small, else to shards; with an index in any case.

    The parts are copied, so that there must be room for the weights twice.

    Servers that read `*.safetensors` (vLLM, SGLang) follow the index if there is one, so they never mistake a mask in the
    same folder for weights.

    Raises:
        OSError: the disk is full or not writable.
    """
    groups: list[list[Path]] = []
    room = 0
    for part in parts:
        room -= part.stat().st_size
        if room < 0:
            groups.append([])
            room = SHARD_BYTES - part.stat().st_size
        groups[-1].append(part)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        name = WEIGHTS_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = join(group, folder / name)
        weight_map |= dict.fromkeys(entries, name)
        total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def join(parts: list[Path], path: Path, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write one safetensors file with the tensors of several.

    Args:
        parts: the files.
        path: the new file, which may exist: it is the same again.
        metadata: of the new file; that of the parts is not kept.

    Returns:
        the new file's header, without its metadata.

    Raises:
        OSError: the disk is full or not writable.
    """
    entries: dict[str, Any] = {}
    starts: list[int] = []  # of each part's data, in the part
    offset = 0  # in the new file's data
    for part in parts:
        with part.open("rb") as opened:  # written here, so it is what it should be
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        starts.append(8 + length)
        for name in header.keys() - {METADATA}:
            begin, end = header[name]["data_offsets"]
            entries[name] = header[name] | {"data_offsets": [begin + offset, end + offset]}
        offset += part.stat().st_size - 8 - length
    entries = dict(sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"]))
    text = json.dumps({METADATA: dict(metadata or {"format": "pt"})} | entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with new_file(path) as scratch, scratch.open("wb") as whole:
        whole.write(struct.pack("<Q", len(text)) + text)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as opened:
                opened.seek(start)
                shutil.copyfileobj(opened, whole, 2**24)
    return entries
