"""The life of a job: whose it is, how it is created or adopted, and when it ends with this process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from components.core.progress import log
from components.distill_distributed.cluster import ApiError, Cluster
from components.distill_distributed.job import MANAGED_BY, RUN_LABEL
from components.distill_distributed.watch import GivenUpError, JobError

WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}


def owner_reference(pod: dict[str, Any]) -> dict[str, Any]:
    """With this in a job's metadata, Kubernetes removes the job together with its owner.

    In a pipeline the owner is the run's Workflow, which Argo names as the owner of each of the run's pods. It must not be the
    pod: a preempted launcher would take its job along, and its next try would train anew. Outside a pipeline it is the pod.
    """
    pod_itself = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    owners = pod["metadata"].get("ownerReferences", [])
    owner = next((owner for owner in owners if owner.items() >= WORKFLOW.items()), pod_itself)
    return {key: owner[key] for key in pod_itself}


def workflow_of(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The reference to the Workflow that owns a job; None if no pipeline runs it, so that nobody tries it again."""
    owners: list[dict[str, Any]] = manifest["metadata"].get("ownerReferences", [])
    return next((owner for owner in owners if owner["kind"] == WORKFLOW["kind"]), None)


@contextmanager
def ended_with_this_process(cluster: Cluster, kind: str, manifest: dict[str, Any]) -> Iterator[None]:
    """Delete the job when this process gives up on it, or is asked to end and no other try of the same run will follow.

    A failed job is kept for inspection; a job whose API server does not respond is left for the next try.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    name, workflow = manifest["metadata"]["name"], workflow_of(manifest)
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except (SystemExit, KeyboardInterrupt, GivenUpError) as reason:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the deletion
        if isinstance(reason, SystemExit) and workflow and goes_on(cluster, workflow):
            log(f"job {name} runs on: the next try of this run adopts it")
        else:
            log(f"deleting job {name}: {'given up' if isinstance(reason, GivenUpError) else 'asked to end'}")
            cluster.delete_job(kind, name)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def goes_on(cluster: Cluster, owner: dict[str, Any]) -> bool:
    """Whether a run goes on although this pod is asked to end; if that is unknown, the job is kept.

    Preemption and Terminate send the same signal. But Terminate first changes the run's Workflow: KFP sets its
    `activeDeadlineSeconds` to 0, Argo's own commands set `shutdown`.
    """
    try:
        workflow = cluster.read_workflow(owner["name"])
    except (ApiError, OSError) as error:
        log(f"whether the run ends is not known, its Workflow {owner['name']} cannot be read: {error}")
        return True
    if workflow is None or workflow["metadata"]["uid"] != owner["uid"] or "deletionTimestamp" in workflow["metadata"]:
        return False
    limit = workflow.get("spec", {}).get("activeDeadlineSeconds")
    return not workflow.get("spec", {}).get("shutdown") and (limit is None or seconds_of(workflow) < limit)


def seconds_of(workflow: dict[str, Any]) -> float:
    """Seconds since a Workflow was started."""
    started = workflow.get("status", {}).get("startedAt") or workflow["metadata"]["creationTimestamp"]
    return (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds()


def submit(cluster: Cluster, kind: str, manifest: dict[str, Any]) -> None:
    """Create the job, or adopt one from an earlier try.

    In a pipeline's own retry a failed job is adopted too, so that the retry fails immediately with the same error instead of
    training all over again; otherwise a failed job is replaced.

    Raises:
        JobError: the name is taken by a job that does not belong to this task.
    """
    metadata = manifest["metadata"]
    while cluster.create_job(kind, manifest) is None:
        found = cluster.read_job(kind, metadata["name"])
        if found is None:
            continue  # it disappeared between the two requests
        theirs = found["metadata"].get("labels", {})
        if any(theirs.get(label) != metadata["labels"][label] for label in (MANAGED_BY, RUN_LABEL)):
            raise JobError(f"job {metadata['name']} exists and belongs to no try of this task")
        retried = workflow_of(manifest) is not None
        if (has_failed(found) and not retried) or "deletionTimestamp" in found["metadata"]:
            log(f"job {metadata['name']} of an earlier try has ended: it is removed and created anew")
            cluster.delete_job(kind, metadata["name"])
            cluster.wait_until_gone(kind, metadata["name"])
            continue
        log(f"job {metadata['name']} of an earlier try is there: adopting it")
        owners = metadata.get("ownerReferences")
        if owners and owners != found["metadata"].get("ownerReferences"):  # another pod, or the Workflow of a run made anew
            cluster.change_metadata(kind, metadata["name"], {"ownerReferences": owners})
        return
    log(f"job {metadata['name']} created: {manifest['kind']} in namespace {metadata['namespace']}")


def has_failed(job: dict[str, Any]) -> bool:
    """Whether a job's status says that it failed."""
    conditions = job.get("status", {}).get("conditions", [])
    return any(entry["type"] == "Failed" and entry["status"] == "True" for entry in conditions)
