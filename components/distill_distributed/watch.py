"""Follow a job until it ends: report what it waits for, show its log and why containers failed, and report the outcome.

A job's status alone is not trusted. Pods that wait to be scheduled or for their image do not count as running; the launcher
holds the deadline, at which an operator may look only when something else happens; the caller has to verify success.
"""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from components.core.progress import clock, log
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.logs import NodeLogs

POLL_SECONDS = 3.0
FAULT_PATIENCE = 600.0  # seconds to wait for a container that cannot be created: a registry may be down
NO_PODS_PATIENCE = 600.0  # seconds after which a job that is not queued but has no pods is given up
RUNNING_SINCE = "sparse-distill/running-since"  # annotation of the job, from which the next try of a launcher counts on
ORDINARY = {"ContainerCreating", "PodInitializing"}
FAULTS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable",
    "CreateContainerConfigError", "CreateContainerError", "RunContainerError",
}  # fmt: skip


class JobError(ValueError):
    """The job failed or was deleted."""


class GivenUpError(JobError):
    """The job has not ended and is not going to succeed."""


@dataclass
class Watcher:
    """Follows one job.

    Attributes:
        cluster: where the job is.
        kind: `pytorchjob` or `trainjob`.
        name: the job's name.
        nodes: number of running pods at which the job counts as running.
        deadline: seconds that the job may run.
        place: where to save the last lines of the nodes if the job fails.
    """

    cluster: Cluster
    kind: str
    name: str
    nodes: int
    deadline: float
    place: str
    said: dict[str, str] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    logs: NodeLogs = field(init=False)

    def __post_init__(self) -> None:
        self.logs = NodeLogs(self.cluster)

    def follow(self) -> None:
        """Wait until the job reports success.

        Raises:
            JobError: it failed, exceeded its deadline, was deleted, or will never start.
        """
        self.since["submitted"] = time.monotonic()
        try:
            while not self._has_succeeded():
                time.sleep(POLL_SECONDS)
        except JobError:
            for name in sorted(self.logs.nodes):
                self.logs.tell(name)
            self.logs.save(self.place)
            raise

    def _has_succeeded(self) -> bool:
        """Look at the job once. Raises JobError as `follow`."""
        job = self.cluster.read_job(self.kind, self.name)
        if job is None:
            raise JobError(f"job {self.name} was deleted while it was watched")
        told = job.get("status", {}).get("conditions", [])
        conditions = {entry["type"]: entry for entry in told if entry["status"] == "True"}
        pods = self.cluster.pods_of(self.kind, self.name)
        self._tell_state(job, conditions, pods)
        self.logs.read(pods)
        for pod in pods:
            self._tell_pod(pod)
        self.failed = {name for name in sorted(self.failed) if not self.logs.tell(name)}
        if failed := conditions.get("Failed"):
            raise JobError(self._account(failed, pods))
        if "Succeeded" in conditions or "Complete" in conditions:
            return True
        self._check_patience(conditions, pods)
        return False

    def _say(self, about: str, line: str) -> None:
        """Print a line unless it repeats the last one about the same subject."""
        if self.said.get(about) != line:
            self.said[about] = line
            log(line)

    def _tell_state(self, job: dict[str, Any], conditions: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        running = [pod for pod in pods if pod["status"].get("phase") == "Running"]
        began = job["metadata"].get("annotations", {}).get(RUNNING_SINCE)
        if "Suspended" in conditions:
            self.since.pop("running", None)
            if began:
                self.cluster.change_metadata(self.kind, self.name, {"annotations": {RUNNING_SINCE: None}})
            self._say(
                "job", f"job {self.name}: queued, it is suspended ({conditions['Suspended'].get('message', 'no reason given')})"
            )
            return
        if began and "running" not in self.since:
            self.since["running"] = time.monotonic() - (time.time() - datetime.fromisoformat(began).timestamp())
            log(f"job {self.name}: running since {began}")
        if "Restarting" in conditions:
            self._say("job", f"job {self.name}: restarting ({conditions['Restarting'].get('message', 'no reason given')})")
        elif len(running) >= self.nodes:
            if "running" not in self.since:
                self.since["running"] = time.monotonic()
                now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
                self.cluster.change_metadata(self.kind, self.name, {"annotations": {RUNNING_SINCE: now}})
                waited = clock(self.since["running"] - self.since["submitted"])
                log(f"job {self.name}: running on {self.nodes} nodes, {waited} after it was submitted")
            self.said.pop("job", None)
        elif not {"Succeeded", "Complete", "Failed"} & conditions.keys():
            self._say("job", f"job {self.name}: {len(running)} of {self.nodes} nodes run")
            self._tell_events(self.name)  # such as pods forbidden by a quota or a missing service account

    def _tell_pod(self, pod: dict[str, Any]) -> None:
        """Report what a pod waits for and which of its containers failed."""
        name = pod["metadata"]["name"]
        if reason := waiting_for(pod):
            self._say(name, f"{name} waits: {reason}")
        else:
            self.said.pop(name, None)
        for status in pod["status"].get("containerStatuses", []):
            for state in (status.get("lastState", {}), status.get("state", {})):
                ended = state.get("terminated")
                key = f"{pod['metadata']['uid']} {status['name']} {ended and ended.get('containerID')}"
                if ended and ended["exitCode"] and key not in self.endings:
                    reason = ended.get("reason", "no reason given")
                    self.endings[key] = f"{name} ended with exit code {ended['exitCode']} ({reason})"
                    log(self.endings[key])
                    self.failed.add(name)

    def _check_patience(self, conditions: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """Give up on a job that cannot recover; waiting for quota or capacity may take long. Raises GivenUpError."""
        if self._lasts("no pods", not pods and "Suspended" not in conditions) > NO_PODS_PATIENCE:
            raise GivenUpError(
                f"job {self.name} had no pods for {NO_PODS_PATIENCE:.0f} s: is the operator for kind {self.kind} installed, "
                "and what do the events say?"
            )
        faults = [reason for pod in pods if (reason := waiting_for(pod)).partition(":")[0] in FAULTS]
        if self._lasts("fault", bool(faults)) > FAULT_PATIENCE:
            raise GivenUpError(f"job {self.name}: a container could not be made for {FAULT_PATIENCE:.0f} s, {faults[0]}")
        if "running" in self.since and time.monotonic() - self.since["running"] >= self.deadline:
            raise GivenUpError(f"job {self.name} still runs at its deadline of {self.deadline:.0f} s")

    def _lasts(self, what: str, is_so: bool) -> float:
        """Seconds for which a condition has held at every poll."""
        if not is_so:
            self.since.pop(what, None)
            return 0.0
        return time.monotonic() - self.since.setdefault(what, time.monotonic())

    def _tell_events(self, name: str) -> None:
        """Print the warning events about an object, each once."""
        for event in self.cluster.events_of(name):
            if event.get("type") == "Warning":
                line = f"  event of {name}: {event.get('reason')}: {event.get('message')}"
                self._say(line, line)

    def _account(self, failed: dict[str, Any], pods: list[dict[str, Any]]) -> str:
        """Why the job failed, in one line; also prints the warning events."""
        for name in (self.name, *(pod["metadata"]["name"] for pod in pods)):
            self._tell_events(name)
        endings = "; ".join(dict.fromkeys(self.endings.values())) or "no container left an exit code"
        return f"job {self.name} failed: {failed.get('reason')}: {failed.get('message')}; {endings}"


def waiting_for(pod: dict[str, Any]) -> str:
    """`reason: message` of what keeps a pod from running; empty if it is nothing unusual."""
    status = pod["status"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{condition.get('reason')}: {condition.get('message')}"
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in ORDINARY:
            return f"{waiting.get('reason')}: {waiting.get('message', 'no message')}"
    return ""
