"""Find the weight files of a checkpoint without reading any weights."""

from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from typing_extensions import TypedDict

from components.core.errors import readable
from components.core.reading import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTO_FILE = "quanto_qmap.json"
PACKED_METHOD = "sparse-distill-packed"  # how the config.json of a checkpoint in a packed format names it


class Index(TypedDict):
    """The part of a checkpoint's index that is used."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single file if there is one, otherwise the shards in its index.

    Raises:
        ValueError: the index is invalid, or names a file that is missing, in another folder or not safetensors.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        return []
    names = sorted(set(read_json(index, Index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} must name safetensors files in its own folder, got {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold every shard that its index names, {name} is missing")
    return [folder / name for name in names]


def weight_bytes(folder: str | Path) -> int:
    """Size of a checkpoint's weights on disk, in bytes."""
    return sum(file.stat().st_size for file in weight_files(Path(folder)))


class Stored(NamedTuple):
    """A tensor in a weight file."""

    file: Path
    shape: list[int]
    dtype: str  # as safetensors calls it, such as BF16


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name → where it is, of all tensors in a checkpoint's weight files; only their headers are read.

    Raises:
        ValueError: a file is not safetensors.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        with readable(f"{file} must be a safetensors file"), safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            found |= {name: Stored(file, part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    return found
