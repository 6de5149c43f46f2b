"""Delete a run's remaining jobs, its checkpoints and its handover data at the end of the run, however it ended."""

import re
from dataclasses import dataclass

from components.core import storage
from components.core.cli import errors_in_one_line, parse
from components.core.progress import log
from components.core.storage import check_place
from components.distill_distributed.cluster import KINDS, Cluster
from components.distill_distributed.job import RUN_LABEL, job_session


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which run's jobs and data to delete."""

    run_id: str
    """The run's id."""
    handover: str = ""
    """The run's setting of this name."""
    checkpoints: str = ""
    """The place of the run's checkpoints; empty = none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", self.run_id):
            raise ValueError(f"run_id must be a run's id, got {self.run_id!r}")
        for parameter in ("handover", "checkpoints"):
            if place := getattr(self, parameter):
                check_place(parameter, place)


def run(config: SweepConfig) -> None:
    """Delete the run's jobs, checkpoints and handover data; all of them may already be gone."""
    cluster = Cluster.connect()
    places = [*filter(None, (config.checkpoints, config.handover and f"{config.handover}/{config.run_id}"))]
    for kind in KINDS:
        for job in cluster.list_jobs(kind, f"{RUN_LABEL}={config.run_id}"):
            name = job["metadata"]["name"]
            storage.use_session(job_session(job), *places)
            cluster.delete_job(kind, name)
            log(f"job {name} deleted")
            cluster.wait_until_gone(kind, name)  # until then its pods may still write
    for place in places:
        try:
            storage.remove(place)
            log(f"{place} removed")
        except (OSError, ValueError) as error:  # a run whose stages have succeeded does not fail for what is left
            log(f"{place} could not be removed, what is left there must be removed by hand: {error}")


def main() -> None:
    """Run the sweep."""
    config = parse(SweepConfig, "Delete the jobs of a run.")
    with errors_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
