"""Upload a pipeline to a cluster and start a run: `python pipelines/submit.py --host … --set model_id=…`."""

import sys
from dataclasses import dataclass
from datetime import datetime

from components.core.checks import check_at_least
from components.core.cli import errors_in_one_line, parse
from components.core.settings import naming
from pipelines.api import PipelineConfig, connect, plain_errors, upload
from pipelines.package import read_package, read_parameters
from pipelines.watch import problems, wait


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(PipelineConfig):
    """Upload a pipeline, unless this exact version already exists, and start a run of it."""

    run_name: str = ""
    """Name of the run; empty = the pipeline's name, date and time."""
    wait: bool = False
    """Wait until the run ends; exit code 1 if it does not succeed."""
    timeout: float = 0.0
    """Maximum number of seconds to wait; the run itself continues afterwards. 0 = no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("timeout", self.timeout, 0)
        if self.timeout and not self.wait:
            raise ValueError(f"timeout must be 0 without wait, got {self.timeout:g}")


def submit(config: SubmitConfig) -> list[str]:
    """Start the run, and wait for it if requested; what can be checked locally is checked before the first request.

    Returns:
        Why the run did not succeed; empty if it did, or without `wait`.

    Raises:
        ValueError: a value is wrong, KFP rejects a request, or waiting times out or is interrupted.
    """
    package = read_package(config.pipeline, cache=not config.no_cache)
    parameters = read_parameters(package, config.params, config.set)
    with plain_errors(config.host):
        client = connect(config)
        version = upload(client, package, config.namespace)
        experiment = client.create_experiment(config.experiment, namespace=config.namespace or None)
        run = client.run_pipeline(  # prints the link
            experiment.experiment_id,
            config.run_name or f"{package.name} {datetime.now():%Y-%m-%d %H-%M-%S}",
            params=parameters,
            pipeline_id=version.pipeline_id,
            version_id=version.pipeline_version_id,
            service_account=config.service_account or None,
        )
        if not config.wait:
            return []
        try:
            return problems(wait(client, run.run_id, config.timeout))
        except KeyboardInterrupt:
            raise ValueError("waiting was interrupted, the run goes on") from None


def main() -> None:
    """Parse the flags, start the run and report how it ended."""
    config = parse(SubmitConfig, "Upload a pipeline to Kubeflow Pipelines and start a run.")
    with errors_in_one_line(), naming(config):
        told = submit(config)
    for problem in told:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
