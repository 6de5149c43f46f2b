"""KFP wrapper of the fetch stage."""

from kfp.dsl import Metrics, Model, Output

from components.images import cpu_pod


@cpu_pod()
def fetch(
    dense_model: Output[Model],
    metrics: Output[Metrics],
    model_id: str,
    revision: str,
    trust_remote_code: bool,
) -> None:
    """Fetch the dense model."""
    from components.core.history import log_metrics
    from components.core.settings import configure
    from components.fetch.config import FetchConfig
    from components.fetch.stage import run

    config = configure(FetchConfig, locals(), output_dir=dense_model.path)
    record = run(config)
    log_metrics(record, metrics)
