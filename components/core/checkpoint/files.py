"""The weight files of a checkpoint, found without reading a weight."""

from pathlib import Path

from components.core.files import read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
QUANTO_FILE = "quanto_qmap.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, else the single one.

    Raises:
        ValueError: the index is none, or names a file that is not there, elsewhere or of another kind.
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
    """Bytes on disk of a checkpoint's weights."""
    return sum(file.stat().st_size for file in weight_files(Path(folder)))
