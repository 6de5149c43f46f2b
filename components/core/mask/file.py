"""The mask file, its names and its fingerprint, for programs without torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import NonNegativeInt
from safetensors import safe_open

from components.core.errors import readable
from components.core.reading import parse_json

MASK_FILE = "sparsity_mask.safetensors"
OLD_MASK_FILE = "sparsity_mask.pt"


def find_mask(path: str | Path) -> Path:
    """Find the mask file, given its own path or that of its folder.

    Raises:
        ValueError: there is no mask file.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in (MASK_FILE, OLD_MASK_FILE) if (file / name).is_file()), file)
    if not file.is_file():
        raise ValueError(f"mask_file must be a {MASK_FILE} or a folder that holds one, got {path}")
    return file


def fingerprint(entries: Iterable[tuple[str, list[int], bytes]]) -> str:
    """SHA-256 over (name, shape, packed bits) of each masked weight, regardless of their order."""
    digest = hashlib.sha256()
    for name, shape, bits in sorted(entries):
        digest.update(json.dumps([name, shape]).encode())
        digest.update(bits)
    return digest.hexdigest()


def shapes_of(metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """The shape of each masked weight, from a mask's metadata. Raises ValueError."""
    return parse_json(metadata["shapes"], "its entry 'shapes'", dict[str, list[NonNegativeInt]])


def fingerprint_of_file(file: Path) -> str:
    """The fingerprint of a mask in a safetensors file.

    Raises:
        ValueError: the file is not a mask.
    """
    with readable(f"mask_file must be a {MASK_FILE}, got {file}"), safe_open(file, framework="numpy") as opened:
        shapes = shapes_of(opened.metadata() or {})
        return fingerprint((name, shape, opened.get_tensor(name).tobytes()) for name, shape in shapes.items())
