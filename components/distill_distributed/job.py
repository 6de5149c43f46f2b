"""The job's manifest: one spec, and a pure renderer for each kind of job.

PyTorchJob, training-operator 1.9: https://www.kubeflow.org/docs/components/trainer/legacy-v1/
TrainJob, Kubeflow Trainer 2.2 and newer: https://www.kubeflow.org/docs/components/trainer/

Both operators configure each node through the PET_* variables that torchrun reads, so its command needs no flags.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from components.core.reading import parse_json
from components.core.storage.session import Session

MANAGED_BY = "app.kubernetes.io/managed-by"
PROJECT = "sparse-distill"
RUN_LABEL = "sparse-distill/run"
SESSION = "sparse-distill/store"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
KEEP_SECONDS = 3600  # how long a finished job is kept, for a restarted launcher and for inspection
SHARED_MEMORY = "8Gi"  # limit of /dev/shm, through which a node's processes communicate; the default is 64 MB


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What runs on the nodes.

    Attributes:
        name: the job's name, a DNS-1035 label.
        namespace: where it runs.
        run: the pipeline run that it belongs to.
        image: the nodes' image.
        command: what each node runs.
        nodes: number of nodes.
        nproc_per_node: processes on each node.
        elastic: minimum and maximum number of nodes, None = all nodes.
        retries: how often each node may be restarted.
        deadline: seconds that the job may run.
        queue: Kueue LocalQueue, "" = none.
        runtime: ClusterTrainingRuntime of a TrainJob.
        service_account: the nodes' ServiceAccount, "" = the default one.
        pod: resources and other settings of the nodes' pods, see `DistillDistributedConfig.pod_settings`.
        session: how the nodes reach the pipeline's artifacts, None = as the libraries do.
        owner: ownerReference to what Kubernetes removes the job with: the run's Workflow or the launcher's pod; None outside a
            cluster.
    """

    name: str
    namespace: str
    run: str
    image: str
    command: list[str]
    nodes: int
    nproc_per_node: int
    elastic: tuple[int, int] | None
    retries: int
    deadline: int
    queue: str
    runtime: str
    service_account: str
    pod: Mapping[str, Any]
    session: Session | None
    owner: Mapping[str, Any] | None = None


def pytorchjob(spec: JobSpec) -> dict[str, Any]:
    """The spec as a PyTorchJob (kubeflow.org/v1).

    A job of fixed size has one master, whose success is that of the job; an elastic job has only workers.
    """
    template = {"metadata": {"labels": labels(spec), "annotations": NO_MESH | notes(spec)}, "spec": pod_spec(spec)}
    replica = {"restartPolicy": "OnFailure", "template": template}
    body: dict[str, Any] = {
        "nprocPerNode": str(spec.nproc_per_node),
        "runPolicy": {
            "activeDeadlineSeconds": spec.deadline,
            # without a limit a failing pod would restart for ever; per node, since one failure ends the processes of all
            "backoffLimit": spec.retries * spec.nodes,
            "cleanPodPolicy": "Running",  # None, the default, keeps pods running and GPUs occupied after a failure
            "ttlSecondsAfterFinished": KEEP_SECONDS,
        },
    }
    if spec.elastic:
        fewest, most = spec.elastic
        body["elasticPolicy"] = {
            "minReplicas": fewest,
            "maxReplicas": most,
            "rdzvBackend": "c10d",
            "rdzvId": spec.name,
            "maxRestarts": max(spec.retries, 1),
        }
        body["pytorchReplicaSpecs"] = {"Worker": {"replicas": spec.nodes, **replica}}
    else:
        workers = {"Worker": {"replicas": spec.nodes - 1, **replica}} if spec.nodes > 1 else {}
        body["pytorchReplicaSpecs"] = {"Master": {"replicas": 1, **replica}, **workers}
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": metadata(spec), "spec": body}


def trainjob(spec: JobSpec) -> dict[str, Any]:
    """The spec as a TrainJob (trainer.kubeflow.org/v1alpha1); restarts are up to its runtime."""
    pod = pod_spec(spec)
    (container,) = pod["containers"]
    trainer = {
        "image": spec.image,
        "command": spec.command,
        "env": container["env"],
        "numNodes": spec.nodes,
        "numProcPerNode": spec.nproc_per_node,
        "resourcesPerNode": container["resources"],
    }
    patched = {name: pod[name] for name in PATCHED if name in pod}
    patched["containers"] = [
        {"name": "node", "volumeMounts": container["volumeMounts"], "securityContext": container["securityContext"]}
    ]
    template = {"metadata": {"labels": labels(spec), "annotations": NO_MESH | notes(spec)}, "spec": patched}
    node = {"name": "node", "template": {"spec": {"template": template}}}
    body = {
        "runtimeRef": {"name": spec.runtime},
        "activeDeadlineSeconds": spec.deadline,
        "trainer": trainer,
        "runtimePatches": [
            {
                "manager": f"{PROJECT}/launcher",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
            }
        ],
    }
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata(spec), "spec": body}


def as_yaml(manifest: dict[str, Any]) -> str:
    """A manifest as YAML, converted through JSON, since YAML would write what master and workers share as an alias."""
    return yaml.safe_dump(json.loads(json.dumps(manifest)), sort_keys=False)


# the user of the images, set explicitly: the operator adds a container with another image to the workers, which would otherwise
# run as root; volumes become writable for the group
NO_ROOT = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 0,
    "fsGroup": 0,
    "seccompProfile": {"type": "RuntimeDefault"},
}
RENDERERS = {"pytorchjob": pytorchjob, "trainjob": trainjob}
NO_MESH = {"sidecar.istio.io/inject": "false"}  # a mesh's sidecar never exits, and blocks traffic between nodes
PATCHED = ("affinity", "nodeSelector", "securityContext", "serviceAccountName", "tolerations", "volumes")


def labels(spec: JobSpec) -> dict[str, str]:
    """Labels that identify the run of the job and its pods, by which the sweep at the end of a run finds them."""
    return {MANAGED_BY: PROJECT, RUN_LABEL: spec.run}


def stored_session(thing: Mapping[str, Any]) -> Session | None:
    """How nodes reach the pipeline's artifacts, from a job or a pod of it; the sweep is given no artifact that tells it.

    Raises:
        ValueError: it is damaged.
    """
    stored = thing["metadata"].get("annotations", {}).get(SESSION)
    return parse_json(stored, SESSION, Session) if stored else None


def notes(spec: JobSpec) -> dict[str, str]:
    """Annotations of the job and of its pods."""
    return {SESSION: json.dumps(asdict(spec.session))} if spec.session else {}


def metadata(spec: JobSpec) -> dict[str, Any]:
    """The job's own metadata."""
    queue = {QUEUE_LABEL: spec.queue} if spec.queue else {}
    owners = {"ownerReferences": [dict(spec.owner)]} if spec.owner else {}
    annotations = {"annotations": notes(spec)} if spec.session else {}
    return {"name": spec.name, "namespace": spec.namespace, "labels": labels(spec) | queue, **annotations, **owners}


def pod_spec(spec: JobSpec) -> dict[str, Any]:
    """A node's pod."""
    own_env = [
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        # the nodes read everything from the run's artifacts or the handover
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        # otherwise a node that restarts alone finds no rendezvous under torch 2.13
        {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"},
    ]
    if spec.elastic:  # older versions of the operator than 1.9.4 do not set it on the nodes of an elastic job
        own_env.append({"name": "PET_NPROC_PER_NODE", "value": str(spec.nproc_per_node)})
    container: dict[str, Any] = {
        "name": "pytorch",
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "command": spec.command,
        "env": [*own_env, *(spec.session.as_env() if spec.session else []), *spec.pod.get("env", [])],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *spec.pod.get("volume_mounts", [])],
        "resources": spec.pod["resources"],
    }
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}}
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,  # the nodes do not call the Kubernetes API
        "containers": [container],
        "securityContext": NO_ROOT,
        "volumes": [memory, *spec.pod.get("volumes", [])],
    }
    if spec.service_account:
        pod["serviceAccountName"] = spec.service_account
    for name, key in (("affinity", "affinity"), ("node_selector", "nodeSelector"), ("tolerations", "tolerations")):
        if name in spec.pod:
            pod[key] = spec.pod[name]
    return pod
