"""What training-operator 1.9 does with a PyTorchJob, including the corner cases that matter to its users:

- `OnFailure` restarts a container in its pod, and only such restarts count towards `backoffLimit`; a pod that is gone, or has
  failed as a whole, is recreated without being counted.
- At the backoff limit or the deadline, all pods and thus their logs are deleted before the job is marked failed. Here they are
  gone at once, so that nobody reads a log that the real operator sometimes leaves for a moment.
- At the deadline it looks only when something happens to the job or its pods.
- A job succeeds when its master does; without a master, when all workers do or, in an elastic job, when any worker does. Pods
  that still run then are removed with their logs.
- The pods of a job without a master are not given their rank.

The init container in which workers wait for the master's name is left out, since its image is not available everywhere.
"""

import copy
from typing import Any

from tests.cluster.operator import Space, is_true, now, past, restarts, set_condition, variables

KIND = ("kubeflow.org", "v1", "pytorchjobs")
PORT = 23456
LABEL = "training.kubeflow.org/"
TO_CLEAN = {"None": (), "Running": ("Running", "Pending"), "All": ("Running", "Pending", "Succeeded", "Failed")}


def environment(job: dict[str, Any], replica: str, index: int) -> dict[str, Any]:
    """The variables that a pod's container gets in addition to its own environment."""
    name, spec = job["metadata"]["name"], job["spec"]
    total = sum(entry.get("replicas", 1) for entry in spec["pytorchReplicaSpecs"].values())
    per_node = spec.get("nprocPerNode", "auto")
    env: dict[str, Any] = {"PYTHONUNBUFFERED": 0, "PET_NPROC_PER_NODE": per_node}
    if "Master" in spec["pytorchReplicaSpecs"]:
        rank = index + (replica == "Worker")
        for prefix in ("", "PET_"):
            env |= {f"{prefix}MASTER_ADDR": f"{name}-master-0", f"{prefix}MASTER_PORT": PORT}
        env |= {"WORLD_SIZE": total * int(per_node) if per_node.isdecimal() else total, "RANK": rank}
        env |= {"PET_NODE_RANK": rank}
    policy = spec.get("elasticPolicy")
    if policy is None:
        return env | {"PET_NNODES": total}
    endpoint = f"{policy.get('rdzvHost', f'{name}-worker-0')}:{policy.get('rdzvPort', PORT)}"
    env |= {"PET_RDZV_ENDPOINT": endpoint, "PET_RDZV_BACKEND": policy.get("rdzvBackend", "c10d")}
    env |= {"PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}"}
    names = {"maxRestarts": "PET_MAX_RESTARTS", "nProcPerNode": "PET_N_PROC_PER_NODE", "rdzvId": "PET_RDZV_ID"}
    env |= {variable: policy[key] for key, variable in names.items() if key in policy}
    if "rdzvConf" in policy:
        env["PET_RDZV_CONF"] = ",".join(f"{entry['key']}={entry['value']}" for entry in policy["rdzvConf"])
    return env


def labels_of(job: dict[str, Any], replica: str, index: int) -> dict[str, str]:
    """The labels by which a replica's Service finds its pod."""
    labels = {"operator-name": "pytorchjob-controller", "job-name": job["metadata"]["name"]}
    labels |= {"replica-type": replica.lower(), "replica-index": str(index)}
    return {LABEL + name: value for name, value in labels.items()}


def create_replica(space: Space, job: dict[str, Any], replica: str, index: int) -> None:
    """Create the pod of a replica, from the job's own template, and its Service."""
    spec = job["spec"]["pytorchReplicaSpecs"][replica]
    pod = copy.deepcopy(spec["template"])
    for container in pod["spec"]["containers"]:
        container["env"] = container.get("env", []) + variables(environment(job, replica, index))
    policy = spec.get("restartPolicy", "OnFailure")
    pod["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
    name, labels = f"{job['metadata']['name']}-{replica.lower()}-{index}", labels_of(job, replica, index)
    leads = replica == "Master" or ("Master" not in job["spec"]["pytorchReplicaSpecs"] and index == 0)
    space.create_service(job, name, labels, PORT)
    space.create(job, name, "pod", labels | ({f"{LABEL}job-role": "master"} if leads else {}), pod)


def reconcile(space: Space, job: dict[str, Any], status: dict[str, Any]) -> None:
    """Reconcile a job."""
    name, policy, replicas = job["metadata"]["name"], job["spec"].get("runPolicy", {}), job["spec"]["pytorchReplicaSpecs"]
    pods = space.pods(f"{LABEL}job-name={name}")
    changed = space.has_changed(job, pods)
    if not status.get("conditions"):
        set_condition(status, "Created", "PyTorchJobCreated", f"PyTorchJob {name} is created.")
    if is_true(status, "Succeeded") or is_true(status, "Failed"):
        clean(space, policy, pods)
        if past(status["completionTime"], policy.get("ttlSecondsAfterFinished")):
            space.custom.delete_namespaced_custom_object(*KIND[:2], space.namespace, KIND[2], name)
        return
    if policy.get("suspend"):
        space.delete(pods)
        message = f"PyTorchJob {name} is suspended."
        if is_true(status, "Running"):
            set_condition(status, "Running", "PyTorchJobSuspended", message, "False")
        set_condition(status, "Suspended", "PyTorchJobSuspended", message)
        return
    if is_true(status, "Suspended"):
        set_condition(status, "Suspended", "PyTorchJobResumed", f"PyTorchJob {name} is resumed.", "False")
        status["startTime"] = now()
    if changed and (reached := limit_reached(policy, status, pods)):
        space.delete(pods, seconds=0)
        conclude(space, job, status, "Failed", f"Job {name} has failed because it {reached}")
        return
    status.setdefault("startTime", now())
    for replica in replicas:
        count(space, job, status, pods, replica)
    for replica in replicas:
        judge(space, job, status, replica)
    if is_true(status, "Succeeded") or is_true(status, "Failed"):
        clean(space, policy, pods)


def clean(space: Space, policy: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
    """Delete the pods that an ended job does not keep."""
    space.delete(pods, TO_CLEAN[policy.get("cleanPodPolicy", "None")], seconds=0)


def limit_reached(policy: dict[str, Any], status: dict[str, Any], pods: dict[str, dict[str, Any]]) -> str | None:
    """Which limit a job has reached, if any."""
    limit = policy.get("backoffLimit")
    known = sum(entry["failed"] for entry in status.get("replicaStatuses", {}).values())
    failed = sum(pod["status"]["phase"] == "Failed" for pod in pods.values())
    if limit is not None and (restarts(list(pods.values())) >= max(limit, 1) or (limit == 0 and failed > known)):
        return "has reached the specified backoff limit"
    if "startTime" in status and past(status["startTime"], policy.get("activeDeadlineSeconds")):
        return "was active longer than specified deadline"
    return None


def count(space: Space, job: dict[str, Any], status: dict[str, Any], pods: dict[str, dict[str, Any]], replica: str) -> None:
    """Create missing replicas, remove failed pods that are to be restarted, and count the replicas by state."""
    name, spec = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"][replica]
    policy = spec.get("restartPolicy", "OnFailure")
    counts = status.setdefault("replicaStatuses", {})[replica] = {"active": 0, "succeeded": 0, "failed": 0}
    for index in range(spec.get("replicas", 1)):
        pod = pods.get(f"{name}-{replica.lower()}-{index}")
        if pod is None:
            create_replica(space, job, replica, index)
            continue
        phase = pod["status"]["phase"]
        if phase in ("Running", "Succeeded", "Failed"):
            counts[{"Running": "active"}.get(phase, phase.lower())] += 1
        if phase != "Failed" or "deletionTimestamp" in pod["metadata"]:
            continue
        codes = [entry["state"]["terminated"]["exitCode"] for entry in pod["status"].get("containerStatuses", [])]
        if policy in ("OnFailure", "Always") or (policy == "ExitCode" and all(code >= 128 for code in codes)):
            space.delete({pod["metadata"]["name"]: pod})
            restart(space, job, status, f"job {name} is restarting because {replica} replica(s) failed.")
        elif policy == "ExitCode":
            conclude(space, job, status, "Failed", f'job "{name}" is failing because "{replica}" replica(s) failed.')


def judge(space: Space, job: dict[str, Any], status: dict[str, Any], replica: str) -> None:
    """Derive the job's condition from the counts of one kind of replica."""
    if is_true(status, "Succeeded") or is_true(status, "Failed"):
        return
    name, replicas = job["metadata"]["name"], job["spec"]["pytorchReplicaSpecs"]
    wanted, counts = replicas[replica].get("replicas", 1), status["replicaStatuses"][replica]
    if replica == "Master" or "Master" not in replicas:
        if counts["active"]:
            set_condition(status, "Running", "PyTorchJobRunning", f"PyTorchJob {name} is running.")
        if counts["succeeded"] >= (1 if "elasticPolicy" in job["spec"] else wanted):
            conclude(space, job, status, "Succeeded", f"PyTorchJob {name} is successfully completed.")
            return
    if counts["failed"] and wanted > counts["succeeded"] + counts["active"]:
        cause = f"because {counts['failed']} {replica} replica(s) failed."
        if replicas[replica].get("restartPolicy", "OnFailure") == "Never":
            conclude(space, job, status, "Failed", f"PyTorchJob {name} is failed {cause}")
        else:
            restart(space, job, status, f"PyTorchJob {name} is restarting {cause}")


def restart(space: Space, job: dict[str, Any], status: dict[str, Any], message: str) -> None:
    """Record that pods are restarted."""
    space.tell(job, "Warning", "PyTorchJobRestarting", message)
    set_condition(status, "Restarting", "PyTorchJobRestarting", message)


def conclude(space: Space, job: dict[str, Any], status: dict[str, Any], kind: str, message: str) -> None:
    """End the job."""
    space.tell(job, "Normal", f"PyTorchJob{kind}", message)
    status["completionTime"] = now()
    set_condition(status, kind, f"PyTorchJob{kind}", message)
