"""Follow a job until it ends: report what it waits for, show its log and why containers failed, and report the outcome.

A job's status alone is not trusted. Pods that wait to be scheduled or for their image do not count as running; the log of a
failed container is read immediately, since the operator may remove its pod; the caller has to verify success.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from components.core.progress import clock, log
from components.distill_distributed.cluster import Cluster

POLL_SECONDS = 3.0
TAIL_LINES = 40
FAULT_PATIENCE = 600.0  # seconds to wait for a container that cannot be created: a registry may be down
NO_PODS_PATIENCE = 600.0  # seconds after which a job that is not queued but has no pods is given up
GRACE_SECONDS = 300.0  # past the deadline, which the operator should enforce, before the launcher does
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
    """

    cluster: Cluster
    kind: str
    name: str
    nodes: int
    deadline: float
    said: dict[str, str] = field(default_factory=dict)
    endings: dict[str, str] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    shown_until: dict[str, str] = field(default_factory=dict)
    log_read: float = 0.0

    def follow(self) -> None:
        """Wait until the job reports success.

        Raises:
            JobError: it failed, exceeded its deadline, was deleted, or will never start.
        """
        self.since["submitted"] = time.monotonic()
        while True:
            job = self.cluster.read_job(self.kind, self.name)
            if job is None:
                raise JobError(f"job {self.name} was deleted while it was watched")
            conditions = {
                entry["type"]: entry for entry in job.get("status", {}).get("conditions", []) if entry["status"] == "True"
            }
            pods = self.cluster.pods_of(self.kind, self.name)
            self._tell_state(conditions, pods)
            for pod in pods:
                self._tell_pod(pod)
            self._show_log(pods)
            if failed := conditions.get("Failed"):
                raise JobError(self._account(failed, pods))
            if "Succeeded" in conditions or "Complete" in conditions:
                return
            self._check_patience(conditions, pods)
            time.sleep(POLL_SECONDS)

    def _say(self, about: str, line: str) -> None:
        """Print a line unless it repeats the last one about the same subject."""
        if self.said.get(about) != line:
            self.said[about] = line
            log(line)

    def _tell_state(self, conditions: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        running = [pod for pod in pods if pod["status"].get("phase") == "Running"]
        if "Suspended" in conditions:
            self.since.pop("running", None)
            self._say(
                "job", f"job {self.name}: queued, it is suspended ({conditions['Suspended'].get('message', 'no reason given')})"
            )
        elif "Restarting" in conditions:
            self._say("job", f"job {self.name}: restarting ({conditions['Restarting'].get('message', 'no reason given')})")
        elif len(running) >= self.nodes:
            if "running" not in self.since:
                self.since["running"] = time.monotonic()
                waited = clock(self.since["running"] - self.since["submitted"])
                log(f"job {self.name}: running on {self.nodes} nodes, {waited} after it was submitted")
            self.said.pop("job", None)
        elif not {"Succeeded", "Complete", "Failed"} & conditions.keys():
            self._say("job", f"job {self.name}: {len(running)} of {self.nodes} nodes run")
            self._tell_events(self.name)  # such as pods forbidden by a quota or a missing service account

    def _tell_pod(self, pod: dict[str, Any]) -> None:
        """Report what a pod waits for, and the last log lines of containers that failed."""
        name = pod["metadata"]["name"]
        if reason := waiting_for(pod):
            self._say(name, f"{name} waits: {reason}")
        else:
            self.said.pop(name, None)
        for status in pod["status"].get("containerStatuses", []):
            for state, previous in ((status.get("state", {}), False), (status.get("lastState", {}), True)):
                ended = state.get("terminated")
                key = f"{pod['metadata']['uid']} {status['name']} {ended and ended.get('containerID')}"
                if ended and ended["exitCode"] and key not in self.endings:
                    self.endings[key] = (
                        f"{name} ended with exit code {ended['exitCode']} ({ended.get('reason', 'no reason given')})"
                    )
                    lines = self.cluster.log(name, status["name"], previous, tail=TAIL_LINES)
                    log(f"{self.endings[key]}; its last lines:")
                    for line in lines:
                        log(f"  {name}| {without_time(line)}")

    def _show_log(self, pods: list[dict[str, Any]]) -> None:
        """Print the new lines in the log of the first node, which logs for all nodes.

        Each request covers the time since the last one, with some overlap, and lines that were already shown are skipped, so
        that nothing is lost or repeated when a request fails or another launcher takes over.
        """
        leader = next((pod for pod in pods if pod["status"].get("phase") in ("Running", "Succeeded", "Failed")), None)
        if leader is None or leader is not pods[0]:
            return
        name, now = leader["metadata"]["name"], time.monotonic()
        shown = self.shown_until.get(leader["metadata"]["uid"], "")
        container = leader["spec"]["containers"][0]["name"]
        for line in self.cluster.log(name, container, False, seconds=int(now - self.log_read) + 30 if shown else None):
            stamp = line.partition(" ")[0]
            if stamp > shown:  # lines may share a timestamp, so `shown` stays as it was
                log(f"  {name}| {without_time(line)}")
                self.shown_until[leader["metadata"]["uid"]] = stamp
        self.log_read = now

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
        if "running" in self.since and time.monotonic() - self.since["running"] > self.deadline + GRACE_SECONDS:
            raise GivenUpError(f"job {self.name} still runs after its deadline of {self.deadline:.0f} s: no operator ended it")

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


def without_time(line: str) -> str:
    """A log line without the timestamp that Kubernetes prepends."""
    return line.partition(" ")[2]
