"""A part of a model that is quantized, and what a format makes of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from components.core.blocks import find_blocks
from components.core.checkpoint.saving import parameters_outside
from components.core.walk.stream import Batch


@dataclass(frozen=True)
class Part:
    """What lies outside a model's blocks, or a block.

    Attributes:
        name: the block's name in the model; empty = what lies outside the blocks.
        module: a copy of it with its weights, to be changed; of what lies outside, the model without the blocks' weights.
        kept: which weights of its pruned matrices are kept, bool, by the names that they have in the module.
        exclude: names of layers that stay as they are.
        words: names of the weights of embedding and head, in what lies outside.
        batches: the calibration text before the block, if rounding needs it.
    """

    name: str
    module: nn.Module
    kept: Mapping[str, Tensor]
    exclude: list[str]
    words: frozenset[str] = frozenset()
    batches: Callable[[], Iterable[Batch]] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of it, by the names in the module."""
        if self.name:
            return self.module.state_dict()
        return parameters_outside(self.module, find_blocks("model_dir", self.module)[1])


class Stored(NamedTuple):
    """What a format stores of a weight.

    Attributes:
        data: its integers or float8, of the weight's shape; zero where nothing is stored.
        places: bool, which weights are stored; None = all are.
    """

    data: Tensor
    places: Tensor | None = None
