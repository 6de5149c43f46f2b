"""A launcher's pod and what it needs: the run's settings, the place of the handover, and access to its job."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream

from components.core.mask.file import MASK_FILE
from components.distill_distributed.lifecycle import WORKFLOW
from components.images import CPU_IMAGE, LAUNCHER_IMAGE
from tests.cluster import pytorchjob
from tests.cluster.operator import ACCOUNT, wait_for

WORKFLOWS = ("argoproj.io", "v1alpha1", "workflows")
STEPS = 20
PATIENCE = 300  # seconds to wait for anything that nodes do: they import torch on shared CPUs
# like KFP's executor: fetch the inputs, run the stage as a child process, collect its outputs if it succeeds
EXECUTOR = """
python -m tarfile -e /inputs/inputs.tar.gz /work
"$@" & echo $! > /work/pid
trap 'kill $(cat /work/pid); wait' TERM
wait $(cat /work/pid) || exit
echo "RESULT $(tr -d '\\n' < /work/student/distill_stats.json)"
"""


def settings(models: Path) -> dict:
    """Settings of a run with a global batch of 8 blocks: `batch_size` must be 4 for one process, 2 for two."""
    return {
        "teacher_model": f"{models}/dense",
        "student_model": f"{models}/pruned",
        "mask_file": f"{models}/pruned/{MASK_FILE}",
        "train_data": f"{models}/tokens",
        "eval_data": f"{models}/tokens",
        "seq_len": 32,
        "eval_seq_len": 32,
        "eval_blocks": 7,
        "grad_accum_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
    }


@dataclass
class Handover:
    """A place for the handover, and what a pod needs to reach it."""

    place: str
    volumes: list[dict] = field(default_factory=list)
    mounts: list[dict] = field(default_factory=list)
    env: list[dict] = field(default_factory=list)


def log_of(space, pod: str) -> str:
    """A pod's log; empty until it has started."""
    phase = space.core.read_namespaced_pod(pod, space.namespace).status.phase
    return "" if phase == "Pending" else space.core.read_namespaced_pod_log(pod, space.namespace)


def run_in(space, pod: str, *command: str) -> str:
    """Run a command in a pod; return what it prints."""
    core = client.CoreV1Api(client.ApiClient(space.api.configuration))  # `stream` makes its client unusable for other threads
    options = {"command": list(command), "stderr": True, "stdin": False, "stdout": True, "tty": False}
    return stream(core.connect_get_namespaced_pod_exec, pod, space.namespace, **options)


class Run:
    """A run of a pipeline: the Workflow to which its pods belong.

    Args:
        space: where it runs.
        name: its id, which is also the Workflow's name.
    """

    def __init__(self, space, name):
        self.custom, self.path, self.name = space.custom, (*WORKFLOWS[:2], space.namespace, WORKFLOWS[2]), name
        body = WORKFLOW | {"metadata": {"name": name}, "spec": {}}
        self.uid = self.custom.create_namespaced_custom_object(*self.path, body)["metadata"]["uid"]

    def owner(self) -> dict:
        """The reference to it as an owner."""
        return WORKFLOW | {"name": self.name, "uid": self.uid}

    def terminate(self) -> None:
        """Do to it what KFP's Terminate does."""
        self.custom.patch_namespaced_custom_object(*self.path, self.name, {"spec": {"activeDeadlineSeconds": 0}})

    def delete(self) -> None:
        """Delete it, if it is there; Kubernetes then deletes what belongs to it."""
        try:
            self.custom.delete_namespaced_custom_object(*self.path, self.name)
        except ApiException as error:
            if error.status != 404:
                raise


class Launcher:
    """A launcher's pod.

    Args:
        space: where it runs.
        name: the pod's name.
        run: the run that it belongs to.
        handover: how it and the nodes exchange models.
        flags: additional settings of the stage.
    """

    def __init__(self, space, name, run, handover, flags):
        self.space, self.name, self.run_id = space, name, run.name
        nodes = {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}, *handover.env]}
        nodes |= {"volumes": handover.volumes, "volume_mounts": handover.mounts}
        flags = settings(Path("/work")) | {
            "output_dir": "/work/student",
            "handover": handover.place,
            "image": CPU_IMAGE,
            "batch_size": 2,
            "gpus": 0,
            "cpu": "500m",  # the limit too; three nodes must find room on two cores
            "memory": "2Gi",
            "service_account": "sparse-distill-worker",
            "pod": json.dumps(nodes),
            **flags,
        }
        stage = ["python", "-m", "components.distill_distributed", *(f"--{key}={value}" for key, value in flags.items())]
        self.create(run, ["sh", "-c", EXECUTOR, "sh", *stage], ["work"], handover)

    def create(self, run, command, folders, handover, image=LAUNCHER_IMAGE) -> None:
        """Create the pod.

        Args:
            run: the run that it belongs to.
            command: what it runs.
            folders: folders below the root that it may write to, besides /tmp.
            handover: what it needs for it.
            image: its image.
        """
        local = {"inputs": {"configMap": {"name": "inputs"}}, **{name: {"emptyDir": {}} for name in (*folders, "tmp")}}
        strict = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
        container = {
            "name": "main",
            "image": image,
            "command": command,
            "env": [{"name": "KFP_POD_NAME", "value": self.name}, *handover.env],
            "securityContext": strict,
            "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in local] + handover.mounts,
        }
        spec = {
            "serviceAccountName": ACCOUNT,
            "restartPolicy": "Never",
            "securityContext": {"runAsNonRoot": True},
            "containers": [container],
            "volumes": [{"name": name, **source} for name, source in local.items()] + handover.volumes,
        }
        owner = run.owner() | {"controller": True, "blockOwnerDeletion": True}
        metadata = {"name": self.name, "labels": {"pipeline/runid": run.name}, "ownerReferences": [owner]}
        self.space.core.create_namespaced_pod(self.space.namespace, {"metadata": metadata, "spec": spec})

    def read(self) -> dict:
        """Its pod."""
        return self.space.pods(f"pipeline/runid={self.run_id}")[self.name]

    def phase(self) -> str:
        return self.read()["status"]["phase"]

    def log(self) -> str:
        return log_of(self.space, self.name)

    def wait_for_line(self, pattern: str, seconds: float = PATIENCE) -> None:
        """Wait until a pattern appears in its log."""

        def is_there():
            over, log = self.phase() in ("Succeeded", "Failed"), self.log()
            found = re.search(pattern, log)
            assert found or not over, f"{self.name} ended without {pattern!r}\n{log}"
            return found

        wait_for(f"{pattern!r} in the log of {self.name}", is_there, seconds)

    def wait_for_end(self, phase: str) -> str:
        """Wait until it ends, which must be in this phase; return its log."""
        wait_for(f"{self.name}'s end", lambda: self.phase() in ("Succeeded", "Failed"), PATIENCE)
        log = self.log()
        assert self.phase() == phase, log
        return log

    def result(self) -> dict:
        """Wait until it succeeds; return the distilled model's statistics."""
        return json.loads(re.search(r"^RESULT (.*)$", self.wait_for_end("Succeeded"), re.MULTILINE)[1])

    def execute(self, *command: str) -> str:
        """Run a command in its pod; return what it prints."""
        return run_in(self.space, self.name, *command)

    def end(self, how: str) -> None:
        """End it.

        Args:
            how: "killed": all its processes at once, "preempted": its pod is deleted and asked to end, "lost": its pod is gone.
        """
        if how == "killed" and self.phase() == "Running":
            self.execute("sh", "-c", "kill -KILL -1")
            self.wait_for_end("Failed")
        else:
            seconds = 30 if how == "preempted" else 0
            self.space.core.delete_namespaced_pod(self.name, self.space.namespace, grace_period_seconds=seconds)

    def jobs(self, kind=pytorchjob.KIND) -> list[dict]:
        """The jobs of its run."""
        group, version, plural = kind
        label = {"label_selector": f"sparse-distill/run={self.run_id}"}
        return self.space.custom.list_namespaced_custom_object(group, version, self.space.namespace, plural, **label)["items"]

    def nodes(self) -> dict[str, dict]:
        """The pods of its run's jobs, keyed by the part of their names after the job's name."""
        return {name.split("-", 2)[2]: pod for name, pod in self.space.pods(f"sparse-distill/run={self.run_id}").items()}
