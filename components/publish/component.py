"""KFP wrapper of the publish stage."""

from typing import List  # noqa: UP035 (KFP reads this spelling of a list of artifacts)

from kfp.dsl import Artifact, Input, Metrics, Model, Output

from components.images import launcher_pod


@launcher_pod()
def publish(
    models: Input[List[Model]],  # noqa: UP006
    report_files: Input[Artifact],
    metrics: Output[Metrics],
    publish_to: str,
    version: str,
    max_ppl_ratio: float,
    min_sparsity: float,
    registry: str,
    registry_model: str,
) -> str:
    """Publish the models and their report if they pass the gate; returns the version's place."""
    from components.core.history import log_metrics
    from components.core.settings import configure
    from components.core.storage import use_store_of
    from components.publish.config import PublishConfig
    from components.publish.stage import run

    use_store_of(report_files.uri, report_files.metadata, publish_to)
    config = configure(PublishConfig, locals(), models=[model.path for model in models], summary_dir=report_files.path)
    record = run(config)
    log_metrics(record, metrics)
    return str(record.measured["place"])
