"""Write a checkpoint again with some of its weights changed, with one block in memory at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from components.core.checkpoint.saving import finish_checkpoint, part_file, save_tensors
from components.core.walk.walk import Walk


def rewrite(walk: Walk, tokenizer: Any, weights: Mapping[str, Tensor], folder: Path, place: Path) -> None:
    """Write a model in the walk's number format.

    Args:
        walk: the model as it was.
        tokenizer: its tokenizer.
        weights: those that replace the model's own, by name.
        folder: where to write.
        place: an existing folder on the same disk, for parts.

    Raises:
        OSError: the disk is full or not writable.
    """
    parts = [part_file(place, number) for number in range(walk.parts)]
    for number, file in enumerate(parts):
        with walk.part(number) as tensors:
            changed = {name: weights[name].to(walk.dtype) if name in weights else tensor for name, tensor in tensors.items()}
            save_tensors(walk.weights.stored_names(changed), file)
    finish_checkpoint(walk.model, tokenizer, parts, walk.dtype, folder)
