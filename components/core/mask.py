"""The sparsity mask: one bit a weight, 1 = kept, in `sparsity_mask.safetensors`.

Each entry is named after the weight it masks and holds its bits in row-major order, eight to a byte, the first in the
lowest bit, the last byte padded with zeros. The file's metadata holds the shapes, the pattern and the sparsity asked for.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from components.core.checks import parse_pattern
from components.core.files import new_file
from components.core.mask_file import find_mask, fingerprint

FORMAT = "sparsity-mask-1"


class SparsityError(ValueError):
    """A weight outside the mask is not zero, or the mask does not have the sparsity that was asked for."""


@dataclass(frozen=True)
class Mask:
    """Which weights are kept.

    Attributes:
        tensors: name of a weight → bool tensor of the weight's shape, True = kept.
        pattern: `unstructured` or `N:M`.
        sparsity: share of zeros asked for; None in a mask of the older form, which does not say.
    """

    tensors: dict[str, Tensor]
    pattern: str = "unstructured"
    sparsity: float | None = None

    def realised_sparsity(self) -> float:
        """Share of weights that are not kept, over all masked tensors."""
        total = sum(mask.numel() for mask in self.tensors.values())
        return 1 - sum(int(mask.sum()) for mask in self.tensors.values()) / max(total, 1)

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits."""
        return fingerprint((name, list(mask.shape), _pack(mask).numpy().tobytes()) for name, mask in self.tensors.items())


def pruned_count(sparsity: float, numel: int) -> int:
    """How many of `numel` weights a sparsity removes: rounded to the nearest."""
    return int(sparsity * numel + 0.5)


def _pack(mask: Tensor) -> Tensor:
    """Bool [*shape] → uint8 [ceil(numel / 8)]."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    """Uint8 [ceil(numel / 8)] → bool [*shape]."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count, bitorder="little").astype(bool)).view(shape)


def save_mask(mask: Mask, path: str | Path) -> None:
    """Write a mask, atomically.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "pattern": mask.pattern,
        "sparsity": json.dumps(mask.sparsity),
        "shapes": json.dumps({name: list(tensor.shape) for name, tensor in mask.tensors.items()}),
    }
    with new_file(path) as scratch:
        try:
            save_file({name: _pack(tensor) for name, tensor in mask.tensors.items()}, scratch, metadata)
        except SafetensorError as error:
            raise OSError(f"writing the mask to {path} failed: {error}") from error


def load_mask(path: str | Path) -> Mask:
    """Read a mask from a file, or from a folder that holds one.

    The older form, `sparsity_mask.pt`, a pickled dictionary of bool tensors, is read without running any code in it.

    Raises:
        ValueError: no such file, or not a mask.
    """
    file = find_mask(path)
    return _load_old(file) if file.suffix == ".pt" else _load_packed(file)


def _load_packed(file: Path) -> Mask:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            packed = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"mask_file must be a safetensors file, got {file}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"mask_file must have format {FORMAT!r} in its metadata, got {metadata.get('format')!r}")
    try:
        shapes = {name: [int(size) for size in shape] for name, shape in json.loads(metadata["shapes"]).items()}
        pattern, sparsity = metadata["pattern"], json.loads(metadata["sparsity"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"mask_file must have shapes, pattern and sparsity in its metadata, got {file}: {error!r}") from error
    parse_pattern(pattern)
    for name in sorted(shapes.keys() ^ packed.keys()):
        raise ValueError(f"mask_file must hold the tensors of its metadata, {name} is in one of the two only")
    tensors = {}
    for name, shape in shapes.items():
        bits = packed[name]
        if bits.dtype != torch.uint8 or bits.numel() != -(-int(np.prod(shape)) // 8):
            raise ValueError(f"mask_file must hold one bit for each weight, {name} has {bits.numel()} bytes for {shape}")
        tensors[name] = _unpack(bits, shape)
    return Mask(tensors, pattern, sparsity)


def _load_old(file: Path) -> Mask:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on the byte where a file is broken
        raise ValueError(f"mask_file must be a dictionary of bool tensors, got {file}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"mask_file must be a dictionary of bool tensors, got {type(content).__name__} in {file}")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            raise ValueError(f"mask_file must be a dictionary of bool tensors, {name} is not one")
    return Mask(content)


def check_fits(mask: Mask, shapes: Mapping[str, Iterable[int]]) -> None:
    """Check that a mask belongs to a model with weights of these shapes.

    Raises:
        ValueError: a masked tensor is missing in the model or has another shape; names it.
    """
    if not mask.tensors:
        raise ValueError("mask_file must mask at least one tensor, got none")
    for name, tensor in mask.tensors.items():
        if name not in shapes:
            raise ValueError(f"mask_file must match the model: it masks {name}, which the model does not have")
        if list(tensor.shape) != list(shapes[name]):
            raise ValueError(
                f"mask_file must match the model: {name} is {list(shapes[name])} there and {list(tensor.shape)} in the mask"
            )


def weight_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name → shape of every parameter."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def head_name(model: Any) -> str:
    """Name of the module that makes the logits."""
    head = model.get_output_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is head)


def prunable_weights(model: Any) -> dict[str, Tensor]:
    """What is pruned, trained and quantized: the weights of all linears but the head, by name."""
    head = head_name(model)
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != head
    }


def check_mask(mask: Mask, model: Any) -> None:
    """Check that a mask belongs to a model and masks nothing but linears outside the head. Raises ValueError."""
    check_fits(mask, weight_shapes(model))
    for name in sorted(mask.tensors.keys() - prunable_weights(model).keys()):
        raise ValueError(f"mask_file must mask linear layers other than the head, got {name}")


def integrity(weights: Mapping[str, Tensor], mask: Mask, eps: float = 0.0) -> dict[str, Any]:
    """Check the invariant: every weight outside the mask is zero and the mask has the sparsity asked for.

    Args:
        weights: name → weight, or its quantized data, [*shape of the mask].
        mask: what must be zero.
        eps: a magnitude up to this counts as zero.

    Returns:
        `passed`, `sparsity` (of the mask), `violations` (weights outside the mask above eps, or not finite), `max_abs` (the
        largest of them), `eps`, and `tensors`, which holds, for each tensor with a fault, what is wrong with it; a kept
        weight that is not finite is a fault too.
    """
    tensors: dict[str, dict[str, Any]] = {}
    violations, largest = 0, 0.0
    for name, kept in mask.tensors.items():
        outside = weights[name].detach()[~kept.to(weights[name].device)].float().abs()
        wrong = outside[~(outside <= eps)]  # NaN is wrong too
        if wrong.numel():
            size = float(wrong.nan_to_num(nan=float(torch.finfo().max), posinf=float(torch.finfo().max)).max())
            tensors[name] = {"violations": wrong.numel(), "max_abs": size}
            violations, largest = violations + wrong.numel(), max(largest, size)
        broken = weights[name].numel() - int(torch.isfinite(weights[name].detach().float()).sum())
        if broken:
            tensors.setdefault(name, {})["not_finite"] = broken
        expected = None if mask.sparsity is None else pruned_count(mask.sparsity, kept.numel())
        pruned = kept.numel() - int(kept.sum())
        if expected is not None and pruned != expected:
            tensors.setdefault(name, {}).update({"pruned": pruned, "asked_for": expected})
    return {
        "passed": not tensors,
        "sparsity": mask.realised_sparsity(),
        "violations": violations,
        "max_abs": largest,
        "eps": eps,
        "tensors": tensors,
    }


def enforce(result: dict[str, Any]) -> None:
    """Raise `SparsityError` if an `integrity` result did not pass; names the worst tensor, how many and how large."""
    if result["passed"]:
        return
    name, found = max(result["tensors"].items(), key=lambda entry: entry[1].get("violations", 0))
    raise SparsityError(
        f"the model must be finite, and zero outside its mask: {result['violations']} weights are not "
        f"(largest {result['max_abs']:.3g}), "
        f"in {len(result['tensors'])} tensors, the worst being {name}: {found}"
    )


@torch.no_grad()
def apply_mask(weights: Mapping[str, Tensor], mask: Mask) -> None:
    """Set every weight outside the mask to zero, in place; also where it is NaN or infinite."""
    for name, kept in mask.tensors.items():
        weights[name].masked_fill_(~kept.to(weights[name].device), 0)
