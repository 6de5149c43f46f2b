"""KFP wrapper of the fetch stage."""

from kfp.dsl import Artifact, Metrics, Model, Output

from components.images import cpu_pod


@cpu_pod()
def fetch(
    dense_model: Output[Model],
    stats: Output[Artifact],
    metrics: Output[Metrics],
    model_id: str,
    revision: str,
    trust_remote_code: bool,
) -> None:
    """Fetch the dense model."""
    from components.core.record import publish
    from components.fetch.config import FetchConfig
    from components.fetch.stage import run

    record = run(
        FetchConfig(model_id=model_id, output_dir=dense_model.path, revision=revision, trust_remote_code=trust_remote_code)
    )
    publish(record, metrics, stats.path)
