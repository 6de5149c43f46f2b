"""KFP wrapper of the report stage."""

from typing import List  # noqa: UP035 (KFP reads this spelling of a list of artifacts)

from kfp.dsl import HTML, Artifact, Input, Metrics, Model, Output

from components.images import cpu_pod


@cpu_pod()
def report(
    models: Input[List[Model]],  # noqa: UP006
    compression_report: Output[HTML],
    report_files: Output[Artifact],
    metrics: Output[Metrics],
) -> None:
    """Draw the report from the models' histories."""
    import shutil

    from components.core.history import REPORT_PAGE, log_metrics
    from components.report.config import ReportConfig
    from components.report.stage import run

    config = ReportConfig(models=[model.path for model in models], output_dir=report_files.path)
    log_metrics(run(config), metrics)
    shutil.copyfile(f"{report_files.path}/{REPORT_PAGE}", compression_report.path)
