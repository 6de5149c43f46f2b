"""How layers and blocks are pruned: the presets, and the settings that differ from them."""

from dataclasses import dataclass, fields, replace
from typing import Any

AUTO, AUTO_NUMBER = "auto", -1  # settings that the preset decides
UNIFORM = "uniform"
CHOICES = {
    "allocation": (UNIFORM, "slope", "owl", "search"),
    "method": ("sparsegpt", "alps", "wanda", "magnitude"),
    "order": ("block", "sequential"),
    "target": ("pruned", "dense"),
    "reconstruct": ("none", "block"),
}


@dataclass(frozen=True)
class Recipe:
    """All that decides how a model is pruned to a total sparsity; the fields are those of `PruneSettings`."""

    allocation: str = UNIFORM
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
    "balanced": Recipe("slope", "alps", order="sequential", target="dense"),
    "best": Recipe("slope", "alps", order="sequential", target="dense", reconstruct="block", reconstruct_epochs=6),
}


def recipe_of(settings: Any) -> Recipe:
    """The recipe of a run: that of its `effort`, but for the settings that are given, and uniform where it can only be so."""
    given = {entry.name: getattr(settings, entry.name) for entry in fields(Recipe)}
    differing = {name: value for name, value in given.items() if value not in (AUTO, AUTO_NUMBER)}
    recipe = EFFORTS[settings.effort]
    if settings.why_uniform():
        recipe = replace(recipe, allocation=UNIFORM)
    return replace(recipe, **differing)
