"""Walks of models that a test has made."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core.blocks import find_blocks
from components.core.checkpoint.loading import load_tokenizer
from components.core.checkpoint.saving import finish_checkpoint
from components.core.walk.rewrite import rewrite_part
from components.core.walk.stream import Batch, batches_of
from components.core.walk.walk import Walk

CPU = torch.device("cpu")


def walk_of(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Walk:
    """Save a model and walk through what was saved."""
    model.save_pretrained(folder)
    return Walk("dense_model", folder, dtype, CPU)


class InMemory(Walk):
    """The walk of a model that is in memory, of whatever class."""

    def __init__(self, model: Any) -> None:
        self.parameter, self.device, self.model = "dense_model", CPU, model
        self.name, self.blocks = find_blocks("dense_model", model)

    def block(self, index):
        return contextlib.nullcontext(self.blocks[index])

    def outside(self):
        return contextlib.nullcontext()


def first_batches(model: Any, ids: Tensor) -> list[Batch]:
    """The batches with which a model's first block is called."""
    walk = InMemory(model)
    recorded = [(rows, *walk._calls(ids[rows.start : rows.stop])) for rows in batches_of(ids)]
    return [Batch(rows, hidden, calls[0]) for rows, hidden, calls in recorded]


def save_again(folder: Path, target: Path) -> None:
    """Write a checkpoint again, as stages write theirs."""
    target.mkdir(exist_ok=True)
    walk = Walk("model_dir", folder, torch.float32, CPU)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        parts = [rewrite_part(walk, number, {}, Path(place)) for number in range(walk.parts)]
        finish_checkpoint(walk.model, load_tokenizer(folder), parts, torch.float32, target)
