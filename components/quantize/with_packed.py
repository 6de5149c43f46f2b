"""Integers of 8 or 4 bits in the packed formats of this project: of pruned matrices, the mask and the kept values alone.

Embedding and head are integers of 8 bits with a scale for each row, or numbers of 16 bits, as is all else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core.checkpoint.files import PACKED_METHOD
from components.core.checkpoint.weights import Weights
from components.core.files import write_json
from components.core.packed.grid import grid_of, nearest
from components.core.packed.record import VERSION, Packed, pack, pack_plain, unpack
from components.core.reading import read_json
from components.quantize.config import QuantizeConfig
from components.quantize.part import Part, Stored
from components.quantize.rounding import round_matrices

NAME = "packed"
BITS = {"packed-int8": 8, "packed-int4": 4}


@torch.no_grad()
def quantize(part: Part, config: QuantizeConfig) -> dict[str, Tensor]:
    """The records of a part, by the names in its module, whose weights become what was rounded.

    Raises:
        ValueError: weights are not finite.
    """
    tensors = part.tensors()
    made = round_matrices(part, BITS[config.format])
    if config.embedding == "int8":
        names = sorted(part.words & tensors.keys())
        made |= {name: nearest(tensors[name], None, grid_of(8, tensors[name].shape[1], 1.0)) for name in names}
    for name, packed in made.items():
        if not torch.isfinite(packed.scales).all():
            raise ValueError(f"model_dir must hold finite weights, {part.name or 'the model'} has others in {name}")
        tensors[name].copy_(packed.dense())
    return {name: pack(made[name]) if name in made else pack_plain(shortened(tensor)) for name, tensor in tensors.items()}


def shortened(tensor: Tensor) -> Tensor:
    """Numbers of 32 bits or more in 16: in bfloat16, which holds those of most models exactly, or float16 if that is nearer."""
    if not tensor.is_floating_point() or tensor.itemsize <= 2:
        return tensor
    wide, narrow = tensor.bfloat16(), tensor.half()
    errors = [(short.to(tensor.dtype) - tensor).abs().amax() if tensor.numel() else 0 for short in (wide, narrow)]
    return narrow if errors[1] < errors[0] else wide


def named(weights: Weights, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Records by the names under which they are stored.

    Raises:
        ValueError: checkpoints of this architecture store weights in another form than the model has them.
    """
    made = weights.stored_names(tensors)
    if {id(record) for record in made.values()} != {id(record) for record in tensors.values()}:
        raise ValueError("format must be int8 for a model whose checkpoints divide its tensors otherwise, got a packed format")
    return made


def finish(model: Any, format: str, exclude: list[str], folder: Path) -> None:
    """Add to a checkpoint's folder what tells that it is packed. Arguments as in `with_quanto.finish`."""
    config = read_json(folder / "config.json", dict[str, Any])
    settings = {"quant_method": PACKED_METHOD, "format": format, "version": VERSION}
    write_json(folder / "config.json", config | {"quantization_config": settings})


def stored(tensors: Mapping[str, Tensor], name: str) -> Stored:
    """What the record of a weight holds."""
    content = unpack(tensors[name])
    assert isinstance(content, Packed)
    places = torch.ones_like(content.integers, dtype=torch.bool) if content.kept is None else content.kept
    return Stored(content.integers, places)
