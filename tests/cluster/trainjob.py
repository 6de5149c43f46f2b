"""What Kubeflow Trainer 2 creates for a TrainJob with its runtime `torch-distributed`: the pods of one indexed Job in a JobSet.

The runtime's own part is hard-coded here, since the runtime object does not exist: a container `node`, restarts in the pod,
and a Job's default limit of 6 restarts.
"""

import copy
from typing import Any

from tests.cluster.operator import Space, is_true, past, restarts, set_condition, variables

KIND = ("trainer.kubeflow.org", "v1alpha1", "trainjobs")
PORT = 29500
BACKOFF_LIMIT = 6
LABEL = "jobset.sigs.k8s.io/"


def pod_of(job: dict[str, Any], index: int) -> dict[str, Any]:
    """A node's pod: the runtime's, then the job's `trainer` and its patches on top, with containers merged by name."""
    name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
    env = {"PET_NNODES": trainer.get("numNodes", 1), "PET_NPROC_PER_NODE": trainer.get("numProcPerNode", "auto")}
    env |= {"PET_NODE_RANK": index, "PET_MASTER_ADDR": f"{name}-node-0-0.{name}", "PET_MASTER_PORT": PORT}
    container = {"name": "node"} | {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
    container |= {"resources": trainer.get("resourcesPerNode", {}), "env": trainer.get("env", []) + variables(env)}
    spec: dict[str, Any] = {"hostname": f"{name}-node-0-{index}", "subdomain": name, "restartPolicy": "OnFailure"}
    metadata: dict[str, Any] = {}
    for patch in job["spec"].get("runtimePatches", []):
        for replicated in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            template = copy.deepcopy(replicated["template"]["spec"]["template"])
            metadata |= template.get("metadata", {})
            for patched in template["spec"].pop("containers", []):
                assert patched.pop("name") == "node"
                assert container.keys().isdisjoint(patched), "Trainer would merge these lists entry by entry"
                container |= patched
            spec |= template["spec"]
    return {"metadata": metadata, "spec": spec | {"containers": [container]}}


def reconcile(space: Space, job: dict[str, Any], status: dict[str, Any]) -> None:
    """Reconcile a job."""
    name, spec = job["metadata"]["name"], job["spec"]
    labels = {f"{LABEL}jobset-name": name, f"{LABEL}replicatedjob-name": "node"}
    pods = space.pods(f"{LABEL}jobset-name={name}")
    phases = [pod["status"]["phase"] for pod in pods.values()]
    if is_true(status, "Complete") or is_true(status, "Failed"):
        space.delete(pods, ("Running", "Pending"))
    elif spec.get("suspend"):
        space.delete(pods)
        set_condition(status, "Suspended", "Suspended", "TrainJob is suspended")
    elif "Failed" in phases or restarts(list(pods.values())) >= BACKOFF_LIMIT:
        set_condition(status, "Failed", "FailedJobs", f"jobset failed due to one or more job failures, first: {name}-node-0")
    elif past(job["metadata"]["creationTimestamp"], spec.get("activeDeadlineSeconds")):
        set_condition(status, "Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline")
    elif phases and set(phases) == {"Succeeded"}:
        set_condition(status, "Complete", "AllJobsCompleted", "jobset completed successfully")
    else:
        if is_true(status, "Suspended"):
            set_condition(status, "Suspended", "Resumed", "TrainJob is resumed", "False")
        for index in range(spec["trainer"].get("numNodes", 1)):
            if f"{name}-node-0-{index}" not in pods:
                space.create_service(job, name, labels, PORT)
                own = labels | {"batch.kubernetes.io/job-completion-index": str(index)}
                space.create(job, f"{name}-node-0-{index}", "pod", own, pod_of(job, index))
