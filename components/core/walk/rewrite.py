"""Write a part of a checkpoint again with some of its weights changed."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from components.core.checkpoint.saving import part_file, save_tensors
from components.core.walk.walk import Walk


def rewrite_part(walk: Walk, number: int, weights: Mapping[str, Tensor], place: Path) -> Path:
    """Write a part of a model in the walk's number format; returns the file.

    Args:
        walk: the model as it was.
        number: of the part, see `Walk.part`.
        weights: those that replace the part's own, by name.
        place: an existing folder, for the file.

    Raises:
        OSError: the disk is full or not writable.
    """
    file = part_file(place, number)
    with walk.part(number) as tensors:
        changed = {name: weights[name].to(walk.dtype) if name in weights else tensor for name, tensor in tensors.items()}
        save_tensors(walk.weights.stored_names(changed), file)
    return file
