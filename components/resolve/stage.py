"""Check what a run was given, then query the hub, or fingerprint the local files."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from components.core.corpus import resolve_corpus
from components.core.history import StageRecord
from components.core.models import resolve_model
from components.core.storage import check_writable
from components.resolve.config import ResolveConfig
from pipelines.checks import check_run

# parameters that may name a place; later stages write to it
PLACES = ("distill_handover", "distill_checkpoints", "publish_to")


def run(config: ResolveConfig) -> StageRecord:
    """Find model_id, model_revision, train_revision and eval_revision; the record's measurements hold them.

    Raises:
        ValueError: a parameter of the run is wrong, or names a place that cannot be written; a model or dataset does not exist
            or is gated, or the hub cannot be reached.
    """
    values = check_run(config.run_parameters())
    config.check_environment()
    check_places(values)
    result = StageRecord("resolve", asdict(config))
    result.measured["model_id"], result.measured["model_revision"] = resolve_model(config.model_id)
    result.measured["train_revision"] = resolve_corpus("train_data", config.train_data)
    result.measured["eval_revision"] = resolve_corpus("eval_data", config.eval_data)
    return result


def check_places(values: Mapping[str, Any]) -> None:
    """Check that each place that the run will write to can be written, by writing and deleting. Raises ValueError."""
    for name in PLACES:
        value = values.get(name, "")
        if value.startswith("/") or "://" in value:  # otherwise it is a word, such as auto
            check_writable(name, value)
