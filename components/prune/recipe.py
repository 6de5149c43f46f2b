"""How layers and blocks are pruned: the presets, and the settings that differ from them."""

from dataclasses import dataclass, fields, replace
from typing import Any

AUTO, AUTO_NUMBER = "auto", -1  # settings that the preset decides
CHOICES = {
    "method": ("sparsegpt", "alps", "wanda", "magnitude"),
    "order": ("block", "sequential"),
    "target": ("pruned", "dense"),
    "reconstruct": ("none", "block"),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides how a block is pruned, once the sparsity is given; the fields are those of `PruneSettings`."""

    method: str = "sparsegpt"
    refit: int = 20
    order: str = "block"
    target: str = "pruned"
    swaps: int = 0
    reconstruct: str = "none"
    reconstruct_epochs: int = 4

    @property
    def needs_dense(self) -> bool:
        """Whether calibration text has to go through the dense blocks too."""
        return self.target == "dense" or self.reconstruct == "block"


EFFORTS = {
    "fast": Recipe(),
    "balanced": Recipe(method="alps", refit=10, order="sequential", target="dense", reconstruct="block", reconstruct_epochs=1),
    "best": Recipe(method="alps", refit=10, order="sequential", target="dense", reconstruct="block", reconstruct_epochs=8),
}


def recipe_of(settings: Any) -> Recipe:
    """The recipe of a run: that of its `effort`, but for the settings that are given."""
    given = {entry.name: getattr(settings, entry.name) for entry in fields(Recipe)}
    differing = {name: value for name, value in given.items() if value not in (AUTO, AUTO_NUMBER)}
    return replace(EFFORTS[settings.effort], **differing)
