"""Upload a pipeline to a cluster and start a run: `python pipelines/submit.py --host … --set model_id=…`.

With `--run_id` it watches or terminates a run that is there already.
"""

import re
import sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kfp.client import Client

from components.core.checks import check_at_least
from components.core.cli import errors_in_one_line, parse
from components.core.errors import one_line, shown
from components.core.progress import log
from components.core.settings import naming
from pipelines.api import PipelineConfig, connect, plain_errors, upload
from pipelines.package import Package, read_package, read_parameters
from pipelines.watch import wait

NEW = "new"
OF_A_NEW_RUN = ("pipeline", "params", "set", "experiment", "service_account", "no_cache", "run_name")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(PipelineConfig):
    """Upload a pipeline, unless this exact version already exists, and start a run of it."""

    run_name: str = ""
    """Name of the run; empty = the pipeline's name, date and time."""
    run_id: str = NEW
    """Watch this run until it ends, instead of starting one; `new` = start one."""
    terminate: bool = False
    """Terminate the run with this run_id instead of watching it; its exit handler still runs."""
    wait: bool = False
    """Wait until the run ends, and tell what happens to its stages; exit code 1 if it does not succeed."""
    timeout: float = 0.0
    """Maximum number of seconds to wait; the run itself continues afterwards. 0 = no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[A-Za-z0-9-]+", self.run_id):
            raise ValueError(f"run_id must be a run's id, letters, digits and hyphens, or {NEW}, got {shown(self.run_id)}")
        if self.run_id == NEW and self.terminate:
            raise ValueError("terminate must be given with the run_id of the run to terminate")
        usual = self if self.run_id == NEW else SubmitConfig()
        for name in OF_A_NEW_RUN:
            if (value := getattr(self, name)) != getattr(usual, name):
                raise ValueError(f"{name} must not be given with run_id, which starts no run, got {shown(value)}")
        check_at_least("timeout", self.timeout, 0)
        if self.timeout and not self.waits:
            raise ValueError(f"timeout must be 0 without wait, got {self.timeout:g}")

    @property
    def waits(self) -> bool:
        """Whether the command goes on until the run ends."""
        return self.wait or (self.run_id != NEW and not self.terminate)


def submit(config: SubmitConfig) -> list[str]:
    """Start, watch or terminate a run, as requested; what can be checked locally is checked before the first request.

    Returns:
        Why the run did not succeed; empty if it did, or if nobody waits.

    Raises:
        ValueError: a value is wrong, KFP rejects a request, or waiting times out or is interrupted.
    """
    package = read_package(config.pipeline, cache=not config.no_cache) if config.run_id == NEW else None
    parameters = read_parameters(package, config.params, config.set) if package else {}
    with plain_errors(config.host):
        client = connect(config)
        run_id = _start(client, config, package, parameters) if package else config.run_id
        if config.terminate:
            client.terminate_run(run_id)
            log(f"run {run_id} is being terminated; its exit handler still runs")
        if not config.waits:
            return []
        try:
            return wait(client, run_id, config.timeout)
        except KeyboardInterrupt:
            ways = f"--run_id {run_id} goes on watching it, --run_id {run_id} --terminate ends it"
            raise ValueError(f"waiting was interrupted, the run goes on: {ways}") from None


def _start(client: Client, config: SubmitConfig, package: Package, parameters: dict[str, Any]) -> str:
    """Upload the pipeline, unless it is there, and start a run of it; returns the run's id."""
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
    return str(run.run_id)


def main() -> None:
    """Parse the flags, start the run and report how it ended."""
    config = parse(SubmitConfig, "Upload a pipeline to Kubeflow Pipelines and start a run.")
    with errors_in_one_line(), naming(config):
        told = submit(config)
    for problem in told:
        print(f"error: {one_line(problem)}", file=sys.stderr)
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
