"""Find the weight files of a checkpoint without reading any weights."""

from pathlib import Path

from safetensors import safe_open

from components.core.files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTO_FILE = "quanto_qmap.json"


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
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} must have a 'weight_map' from weights to shards") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} must name safetensors files in its own folder, got {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} must hold every shard that its index names, {name} is missing")
    return [folder / name for name in names]


def weight_bytes(folder: str | Path) -> int:
    """Size of a checkpoint's weights on disk, in bytes."""
    return sum(file.stat().st_size for file in weight_files(Path(folder)))


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint's weight files."""
    names: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="numpy") as opened:
            names |= set(opened.keys())
    return names
