"""The sparsity mask: one bit per weight, 1 = kept, in `sparsity_mask.safetensors`.

Each entry is named after the weight it masks and holds its bits in row-major order, eight to a byte, the first in the
lowest bit, the last byte padded with zeros. The file's metadata holds the shapes, the pattern and the requested sparsity: a
number for every weight, or one for each by name.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from components.core.checkpoint.saving import join, save_tensors
from components.core.checks import parse_pattern
from components.core.errors import readable, shown
from components.core.files import new_file
from components.core.mask.file import find_mask, fingerprint, shapes_of
from components.core.reading import parse_json

FORMAT = "sparsity-mask-1"
Share = Annotated[float, Field(ge=0, lt=1)]
Sparsity = Share | dict[str, Share] | None


@dataclass(frozen=True)
class Mask:
    """Which weights are kept.

    Attributes:
        tensors: name of a weight → bool tensor of the weight's shape, True = kept. Those of a file are read when they are used.
        pattern: `unstructured` or `N:M`.
        sparsity: requested share of zeros in every weight, or by a weight's name, if they differ; None for a mask in the older
            format, which does not record it.
    """

    tensors: Mapping[str, Tensor]
    pattern: str = "unstructured"
    sparsity: float | Mapping[str, float] | None = None

    def requested_count(self, name: str) -> int | None:
        """How many zeros a weight was to have; None if that is not recorded."""
        if self.sparsity is None:
            return None
        share = self.sparsity[name] if isinstance(self.sparsity, Mapping) else self.sparsity
        return pruned_of(share, self.tensors[name].shape)

    def realised_sparsity(self) -> float:
        """Share of weights that are not kept, over all masked tensors."""
        counts = [(int(mask.sum()), mask.numel()) for mask in self.tensors.values()]
        return 1 - sum(kept for kept, _ in counts) / max(sum(total for _, total in counts), 1)

    def only(self, names: Iterable[str]) -> "Mask":
        """The mask of some of the weights."""
        return Mask({name: self.tensors[name] for name in names}, self.pattern, self.sparsity)

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits."""
        return fingerprint((name, list(mask.shape), _pack(mask).numpy().tobytes()) for name, mask in self.tensors.items())


def pruned_count(sparsity: float, numel: int) -> int:
    """How many of `numel` weights a sparsity removes, rounded to the nearest integer."""
    return int(sparsity * numel + 0.5)


def pruned_of(sparsity: float, shape: Sequence[int]) -> int:
    """How many weights a sparsity removes from a parameter [out, in], or from one with several matrices [experts, out, in]."""
    return pruned_count(sparsity, math.prod(shape[-2:])) * math.prod(shape[:-2])


def _pack(mask: Tensor) -> Tensor:
    """Bool [*shape] → uint8 [ceil(numel / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    """Uint8 [ceil(numel / 8)] → bool [*shape]."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little").astype(bool)).view(shape)


def save_mask(mask: Mask, path: str | Path) -> None:
    """Write a mask atomically.

    Raises:
        OSError: the disk is full or not writable.
    """
    with new_file(path) as scratch:
        part = scratch.with_name("part")
        save_mask_part(mask.tensors, part)
        shapes = {name: list(tensor.shape) for name, tensor in mask.tensors.items()}
        join_mask([part], scratch, mask.pattern, mask.sparsity, shapes)


def save_mask_part(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the bits of some weights, to be joined with those of others.

    Raises:
        OSError: the disk is full or not writable.
    """
    save_tensors({name: _pack(tensor) for name, tensor in tensors.items()}, path)


def join_mask(
    parts: list[Path],
    path: Path,
    pattern: str,
    sparsity: float | Mapping[str, float] | None,
    shapes: Mapping[str, list[int]],
) -> None:
    """Write a mask file from its parts, atomically.

    Args:
        parts: files that `save_mask_part` wrote.
        path: the new file.
        pattern: see `Mask`.
        sparsity: see `Mask`.
        shapes: of all masked weights, by name.

    Raises:
        OSError: the disk is full or not writable.
    """
    metadata = {"format": FORMAT, "pattern": pattern, "sparsity": json.dumps(sparsity), "shapes": json.dumps(shapes)}
    join(parts, path, metadata)


def load_mask(path: str | Path) -> Mask:
    """Read a mask from its file, or from the folder that contains it.

    The older format, `sparsity_mask.pt`, is a pickled dictionary of bool tensors; no code in it is run.

    Raises:
        ValueError: the file does not exist or is not a mask.
    """
    file = find_mask(path)
    return _load_old(file) if file.suffix == ".pt" else _load_packed(file)


def _load_packed(file: Path) -> Mask:
    with readable(f"mask_file must be a safetensors file, got {file}"), safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        packed = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        sizes = {name: (bits.get_dtype(), math.prod(bits.get_shape())) for name, bits in packed.items()}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"mask_file must have format {FORMAT!r} in its metadata, got {shown(metadata.get('format'))}")
    with readable(f"mask_file must have shapes, pattern and sparsity in its metadata, got {file}"):
        shapes, pattern = shapes_of(metadata), metadata["pattern"]
        sparsity: Any = parse_json(metadata["sparsity"], "its entry 'sparsity'", Sparsity)  # type: ignore[arg-type]
        parse_pattern(pattern)
    for name in sorted(shapes.keys() ^ sizes.keys()):
        raise ValueError(f"mask_file must hold the tensors of its metadata, {name} is in one of the two only")
    for name, shape in shapes.items():
        kind, count = sizes[name]
        if kind != "U8" or count != -(-math.prod(shape) // 8):
            raise ValueError(f"mask_file must hold one bit for each weight, {name} has {count} of {kind} for {shape}")
    if isinstance(sparsity, dict) and sparsity.keys() != shapes.keys():
        raise ValueError(f"mask_file must have a sparsity for each of its {len(shapes)} tensors, got {len(sparsity)}")
    return Mask(PackedTensors(file, shapes), pattern, sparsity)


class PackedTensors(Mapping[str, Tensor]):
    """The bool tensors of a mask file, each read when it is used: of a large model, not all of them fit in memory.

    Args:
        file: the mask file.
        shapes: of the tensors, by name.
    """

    def __init__(self, file: Path, shapes: Mapping[str, list[int]]) -> None:
        self.file, self.shapes = file, shapes

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        with readable(f"mask_file must be a safetensors file, got {self.file}"), safe_open(self.file, framework="pt") as opened:
            return _unpack(opened.get_tensor(name), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _load_old(file: Path) -> Mask:
    with readable(f"mask_file must be a dictionary of bool tensors, got {file}"):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"mask_file must be a dictionary of bool tensors, got {type(content).__name__} in {file}")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            raise ValueError(f"mask_file must be a dictionary of bool tensors, {name} is not one")
    return Mask(content)
