"""What is known about the models to publish, and whether they are good enough. Nothing is measured here.

A model's history gives its own perplexity and sparsity, and the dense model's perplexity before pruning. Two
perplexities are compared only if they were measured on the same text. A limit on an unknown number is not met.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.errors import shown
from components.core.history import HISTORY_FILE, read_history

# each layer loses a whole number of weights, so a model pruned to 0.7 may have 0.6999995
ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to publish.

    Attributes:
        name: its folder in the version: the format, such as `int8`, or the stage if it is not quantized.
        folder: the checkpoint.
        source: `model_id` and `revision` of the dense model.
        perplexity: the model's own; None if it was not measured.
        dense_perplexity: the dense model's on the same text; None if it was not measured on that text.
        sparsity: share of weights that are zero; None if it was not measured, or the integrity check failed.
        bytes: size of its weights on disk.
    """

    name: str
    folder: Path
    source: dict[str, Any]
    perplexity: float | None
    dense_perplexity: float | None
    sparsity: float | None
    bytes: float | None

    def ppl_ratio(self) -> float | None:
        """The perplexity divided by the dense model's; None if either is unknown."""
        return self.perplexity / self.dense_perplexity if self.perplexity and self.dense_perplexity else None


def read_candidate(folder: str) -> Candidate:
    """Read a checkpoint's history.

    Raises:
        ValueError: the history was not written by these stages, or its last step has no usable name.
    """
    history = read_history(folder)
    steps = history["steps"]
    if not steps:
        raise ValueError(f"{Path(folder) / HISTORY_FILE} must list at least one step, got none")
    last = steps[-1]
    measured, check = last.get("measured", {}), last.get("sparse_integrity_check")
    pruning = next((step.get("measured", {}) for step in steps if step["stage"] == "prune"), {})
    same_text = measured.get("perplexity_text") and pruning.get("perplexity_text") == measured["perplexity_text"]
    return Candidate(
        name=_folder_name(folder, str(last["parameters"].get("format")) if last["stage"] == "quantize" else last["stage"]),
        folder=Path(folder),
        source={"model_id": history["source"]["model_id"], "revision": history["source"]["revision"]},
        perplexity=_number(measured, "perplexity"),
        dense_perplexity=_number(pruning, "perplexity_before") if same_text else None,
        sparsity=_number(measured, "sparsity") if check and check.get("passed") is True else None,
        bytes=_number(measured, "bytes"),
    )


def _folder_name(folder: str, name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        file = Path(folder) / HISTORY_FILE
        raise ValueError(f"{file}: a model's format must be lower-case letters, digits, '_' and '-', got {shown(name)}")
    return name


def _number(measured: Mapping[str, Any], name: str) -> float | None:
    value = measured.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return value if usable else None


def check_gate(candidates: list[Candidate], max_ppl_ratio: float, min_sparsity: float) -> None:
    """Check every model against every limit.

    Args:
        candidates: the models.
        max_ppl_ratio: largest ratio of perplexity to the dense model's; 0 = no limit.
        min_sparsity: smallest share of zeros; 0 = no limit.

    Raises:
        ValueError: some limits are not met, or their numbers are unknown; the message lists all of them.
    """
    failures = [
        f"{candidate.name}: {failure}"
        for candidate in candidates
        for failure in (_perplexity_failure(candidate, max_ppl_ratio), _sparsity_failure(candidate, min_sparsity))
        if failure
    ]
    if failures:
        raise ValueError("nothing is published, the gate failed; " + "; ".join(failures))


def _perplexity_failure(candidate: Candidate, limit: float) -> str | None:
    ratio = candidate.ppl_ratio()
    if not limit or (ratio is not None and ratio <= limit):
        return None
    rule = f"perplexity over dense must be at most max_ppl_ratio {limit}"
    if ratio is not None:
        return f"{rule}, got {ratio:.4f} ({candidate.perplexity:.4f} over {candidate.dense_perplexity:.4f})"
    missing = "the model's perplexity" if candidate.perplexity is None else "the dense model's perplexity on the same text"
    return f"{rule}, and {missing} was not measured"


def _sparsity_failure(candidate: Candidate, limit: float) -> str | None:
    sparsity = candidate.sparsity
    if not limit or (sparsity is not None and sparsity >= limit - ROUNDING):
        return None
    rule = f"sparsity must be at least min_sparsity {limit}"
    return f"{rule}, got {sparsity}" if sparsity is not None else f"{rule}, and no sparsity was measured that holds"
