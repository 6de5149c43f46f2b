"""Query the hub, or fingerprint the local files."""

from dataclasses import asdict

from components.core.corpus import resolve_corpus
from components.core.history import StageRecord
from components.core.models import resolve_model
from components.resolve.config import ResolveConfig


def run(config: ResolveConfig) -> StageRecord:
    """Find model_id, model_revision, train_revision and eval_revision; the record's measurements hold them.

    Raises:
        ValueError: a model or dataset does not exist or is gated, or the hub cannot be reached.
    """
    config.check_environment()
    result = StageRecord("resolve", asdict(config))
    result.measured["model_id"], result.measured["model_revision"] = resolve_model(config.model_id)
    result.measured["train_revision"] = resolve_corpus("train_data", config.train_data)
    result.measured["eval_revision"] = resolve_corpus("eval_data", config.eval_data)
    return result
