"""Check what a run was given, query the hub, or fingerprint the local files, and size the pods of the stages."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from components.core.checks import AUTO
from components.core.corpus import resolve_corpus
from components.core.errors import one_line
from components.core.history import StageRecord
from components.core.models import resolve_model
from components.core.progress import log
from components.core.storage import check_writable
from components.resolve.config import ResolveConfig
from components.resolve.shape import model_shape
from components.resolve.sizing import STAGES, limit, total
from pipelines.checks import check_run

# parameters that may name a place; later stages write to it
PLACES = ("distill_handover", "distill_checkpoints", "publish_to")
# memory of the stages' pods for a model whose sizes are not known: enough for a few billion parameters
FALLBACK = {"prune": "16Gi", "distill": "32Gi", "quantize": "16Gi"}


def run(config: ResolveConfig) -> StageRecord:
    """Find model_id, model_revision, train_revision, eval_revision and the stages' memory; the record's measurements hold them.

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
    result.measured |= memory_limits(values, result.measured["model_id"], result.measured["model_revision"])
    return result


def memory_limits(values: Mapping[str, Any], model_id: str, revision: str) -> dict[str, str]:
    """The memory limit of each large stage's pod, by the parameter's name: as given, or for `auto` by the sizes of the model.

    Args:
        values: the run's parameters by name.
        model_id: the model, without its revision.
        revision: its revision.
    """
    limits = {f"{stage}_memory": str(values[f"{stage}_memory"]) for stage in STAGES}
    if AUTO not in limits.values():
        return limits
    try:
        shape = model_shape(model_id, revision)
    except ValueError as error:
        log(f"the pods have the memory of an average model, since the sizes of {model_id} are not known: {one_line(error)}")
        return {name: FALLBACK[name.partition("_")[0]] if value == AUTO else value for name, value in limits.items()}
    for stage, needed in STAGES.items():
        need, name = needed(shape, values), f"{stage}_memory"
        if limits[name] == AUTO:
            limits[name] = limit(total(need.host))
        memory, gpu, disk = (f"{total(terms) / 1e9:.1f} GB" for terms in (need.host, need.gpu, need.disk))
        on_gpu = f", {gpu} of each GPU" if need.gpu else ""
        log(f"{stage}: {limits[name]} of memory; about {memory}{on_gpu} and {disk} of disk are needed")
    return limits


def check_places(values: Mapping[str, Any]) -> None:
    """Check that each place that the run will write to can be written, by writing and deleting. Raises ValueError."""
    for name in PLACES:
        value = values.get(name, "")
        if value.startswith("/") or "://" in value:  # otherwise it is a word, such as auto
            check_writable(name, value)
