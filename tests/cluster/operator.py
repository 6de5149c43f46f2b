"""A small stand-in for Kubeflow's operators: it creates real pods and Services for a namespace's PyTorchJobs and TrainJobs.

This module has what both kinds of job share; what an operator does with a job is in `pytorchjob` and `trainjob`.
"""

import copy
import threading
import time
from datetime import UTC, datetime
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

POLL_SECONDS = 0.5
ACCOUNT = "pipeline-runner"


def wait_for(what: str, condition, seconds: float = 60):
    """Wait until a condition is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.3)
    return value


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def past(stamp: str, seconds: float | None) -> bool:
    """Whether `seconds` have passed since a time; false if it is None."""
    return seconds is not None and (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds() >= seconds


def is_true(status: dict[str, Any], kind: str) -> bool:
    """Whether a condition is true in a job's status."""
    return any(entry["type"] == kind and entry["status"] == "True" for entry in status.get("conditions", []))


def set_condition(status: dict[str, Any], kind: str, reason: str, message: str, value: str = "True") -> None:
    """Add or change a condition; Running and Restarting replace each other, and the end of the job sets Running to False."""
    entry = {"type": kind, "status": value, "reason": reason, "message": message}
    conditions = status.setdefault("conditions", [])
    if any(entry.items() <= old.items() for old in conditions):
        return
    rival = {"Running": "Restarting", "Restarting": "Running"}.get(kind)
    kept = [old for old in conditions if old["type"] not in (kind, rival)]
    if kind in ("Succeeded", "Failed"):
        kept = [old | {"status": "False"} if old["type"] == "Running" else old for old in kept]
    conditions[:] = [*kept, entry | {"lastTransitionTime": now()}]


def restarts(pods: list[dict[str, Any]]) -> int:
    """How often the containers of running pods have been restarted."""
    running = [pod for pod in pods if pod["status"].get("phase") == "Running"]
    return sum(entry["restartCount"] for pod in running for entry in pod["status"].get("containerStatuses", []))


def variables(values: dict[str, Any]) -> list[dict[str, str]]:
    """Environment variables in the format of a container's `env`."""
    return [{"name": name, "value": str(value)} for name, value in values.items()]


class Space:
    """A namespace and what the operators do in it, with objects as plain dictionaries.

    Args:
        api: a client with all rights there.
        namespace: its name.
    """

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self.core, self.custom, self.api, self.namespace = client.CoreV1Api(api), client.CustomObjectsApi(api), api, namespace
        self.fault: Exception | None = None  # why the operator died; `pods` raises it to whoever waits for its work
        self.seen: dict[str, dict[str, str]] = {}  # uid of a job → name → version of the job and its pods when it was looked at

    def pods(self, selector: str) -> dict[str, dict[str, Any]]:
        """Pods with a label, by name."""
        if self.fault:
            raise self.fault
        found = self.core.list_namespaced_pod(self.namespace, label_selector=selector).items
        return {pod.metadata.name: self.api.sanitize_for_serialization(pod) for pod in found}

    def delete(self, pods, phases=("Pending", "Running", "Succeeded", "Failed", "Unknown"), seconds: int | None = None) -> None:
        """Delete the pods that are in one of the phases; with 0 `seconds` they and their logs are gone at once."""
        for name, pod in pods.items():
            if pod["status"]["phase"] in phases and ("deletionTimestamp" not in pod["metadata"] or seconds == 0):
                self.core.delete_namespaced_pod(name, self.namespace, grace_period_seconds=seconds)

    def has_changed(self, job, pods) -> bool:
        """Whether anything has happened to a job or its pods since this was last asked."""
        versions = {name: thing["metadata"]["resourceVersion"] for name, thing in {"": job, **pods}.items()}
        before, self.seen[job["metadata"]["uid"]] = self.seen.get(job["metadata"]["uid"]), versions
        return versions != before

    def create(self, job, name: str, kind: str, labels: dict[str, str], body: dict[str, Any]) -> None:
        """Create a pod or Service that belongs to a job, unless it exists."""
        owner = {key: job[key] for key in ("apiVersion", "kind")} | {key: job["metadata"][key] for key in ("name", "uid")}
        given = body.pop("metadata", {})
        metadata = {"name": name, "labels": given.get("labels", {}) | labels, "annotations": given.get("annotations", {})}
        metadata["ownerReferences"] = [owner | {"controller": True, "blockOwnerDeletion": True}]
        try:
            getattr(self.core, f"create_namespaced_{kind}")(self.namespace, {"metadata": metadata, **body})
        except ApiException as error:
            if error.status != 409:
                raise

    def create_service(self, job, name: str, labels: dict[str, str], port: int) -> None:
        """Create a headless Service for the pods with these labels."""
        spec = {"clusterIP": "None", "selector": labels, "ports": [{"name": "torchrun", "port": port}]}
        self.create(job, name, "service", labels, {"spec": spec})

    def tell(self, job, kind: str, reason: str, message: str) -> None:
        """Record an event about a job."""
        about = {key: job[key] for key in ("apiVersion", "kind")}
        about |= {key: job["metadata"][key] for key in ("name", "namespace", "uid")}
        event = {"metadata": {"generateName": f"{job['metadata']['name']}."}, "involvedObject": about, "type": kind}
        event |= {"reason": reason, "message": message, "firstTimestamp": now(), "lastTimestamp": now(), "count": 1}
        self.core.create_namespaced_event(self.namespace, event)


class Operator(threading.Thread):
    """Reconciles the jobs of a namespace until it is stopped.

    Args:
        space: the namespace.
        kinds: (group, version, plural) of a kind of job → the function that reconciles such a job and updates its status.
    """

    def __init__(self, space: Space, kinds) -> None:
        super().__init__(name="operator", daemon=True)
        self.space, self.kinds = space, kinds
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            while not self.ended.wait(POLL_SECONDS):
                for (group, version, plural), reconcile in self.kinds.items():
                    path = (group, version, self.space.namespace, plural)
                    for job in self.space.custom.list_namespaced_custom_object(*path)["items"]:
                        if "deletionTimestamp" not in job["metadata"]:
                            self.bring_forward(path, job, reconcile)
        except Exception as error:
            self.space.fault = error

    def bring_forward(self, path, job, reconcile) -> None:
        """Reconcile one job once; concurrent changes by others are seen at the next poll."""
        before = copy.deepcopy(job.setdefault("status", {}))
        try:
            reconcile(self.space, job, job["status"])
            if job["status"] != before:
                self.space.custom.replace_namespaced_custom_object_status(*path, job["metadata"]["name"], job)
        except ApiException as error:
            if error.status not in (404, 409):
                raise

    def stop(self) -> None:
        """Stop; raise the error that it died of, if any."""
        self.ended.set()
        self.join()
        if self.space.fault:
            raise self.space.fault
