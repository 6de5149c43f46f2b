"""Delete a run's remaining jobs, its checkpoints and its handover data at the end of the run, however it ended."""

import re
from dataclasses import dataclass
from typing import Any

from components.core import storage
from components.core.cli import errors_in_one_line, parse
from components.core.progress import log
from components.core.storage import check_place
from components.distill_distributed.cluster import KINDS, Cluster
from components.distill_distributed.job import RUN_LABEL, stored_session


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
    """Delete the run's jobs, checkpoints and handover data; all of them may already be gone.

    Raises:
        ValueError: a job or its pods do not go away; the data are left, since they may still write.
    """
    cluster, label = Cluster.connect(), f"{RUN_LABEL}={config.run_id}"
    jobs = [(kind, job) for kind in KINDS for job in cluster.list_jobs(kind, label)]
    pods = cluster.pods_with(label)  # those of a job that the launcher has deleted may still end
    for kind, job in jobs:
        cluster.delete_job(kind, job["metadata"]["name"])
        log(f"job {job['metadata']['name']} deleted")
    for kind, job in jobs:
        cluster.wait_until_gone(kind, job["metadata"]["name"])
    cluster.wait_until_no_pods(label)
    remove_data(config, [*(job for _, job in jobs), *pods])


def remove_data(config: SweepConfig, jobs_and_pods: list[dict[str, Any]]) -> None:
    """Remove what the run's nodes have written besides its artifacts, in the store that they were told of."""
    places = [*filter(None, (config.checkpoints, config.handover and f"{config.handover}/{config.run_id}"))]
    try:
        session = next(filter(None, map(stored_session, jobs_and_pods)), None)
        storage.use_session(session, *places)
    except ValueError as error:
        log(f"the store of the artifacts cannot be reached as KFP says: {error}")
    for place in places:
        storage.remove_leftovers(place)


def main() -> None:
    """Run the sweep."""
    config = parse(SweepConfig, "Delete the jobs of a run.")
    with errors_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
