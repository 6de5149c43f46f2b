"""KFP wrapper of the report stage."""

from typing import List  # noqa: UP035 (KFP reads this spelling of a list of artifacts)

from kfp.dsl import HTML, Artifact, Input, Metrics, Output

from components.images import cpu_pod


@cpu_pod()
def report(
    fetched: Input[Artifact],
    pruned: Input[Artifact],
    distilled: Input[Artifact],
    quantized: Input[List[Artifact]],  # noqa: UP006
    summary: Output[Artifact],
    page: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Draw the report from the stages' records."""
    import shutil

    from components.core.history import log_metrics
    from components.report.config import ReportConfig
    from components.report.stage import run

    records = [artifact.path for artifact in (fetched, pruned, distilled, *quantized)]
    log_metrics(run(ReportConfig(records=records, output_dir=summary.path)), metrics)
    shutil.copyfile(f"{summary.path}/report.html", page.path)
