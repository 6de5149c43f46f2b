"""Settings for distillation on many nodes: those of the distill stage plus those of the job."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.core.checks import (
    check_at_least,
    check_cpu,
    check_gpus,
    check_memory,
    check_not_empty,
    check_one_of,
    check_resource,
)
from components.core.errors import shown
from components.core.reading import parse_json
from components.core.settings import EXECUTION, START, Settings
from components.core.storage import check_place
from components.distill.checkpoints import CheckpointSettings
from components.distill.config import NOT_IN_PIPELINES as NOT_IN_COMPRESS
from components.distill.config import DistillConfig, DistillSettings

KINDS = ("pytorchjob", "trainjob")
POD_SETTINGS = ("affinity", "env", "node_selector", "tolerations", "volume_mounts", "volumes")
NOT_IN_PIPELINES = NOT_IN_COMPRESS | {
    "backend": "only fsdp runs on many nodes",
    "launcher": "the nodes always use torchrun",
    "master_port": "the job's operator sets it",
    "checkpoint_dir": "checkpoints decides",
    "deepspeed_config": "only used with backend deepspeed",
}
LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class JobSettings(CheckpointSettings, DistillSettings):
    """How to distil on many nodes."""

    backend: str = field(default="fsdp", metadata=EXECUTION)
    """Only `fsdp` is supported."""
    launcher: str = field(default="torchrun", metadata=START)
    """Only `torchrun` is supported; every node starts it."""
    handover: str = ""
    """For nodes that cannot reach the pipeline's artifacts: where they and the launcher exchange models and checkpoints
    instead, a gs://, s3:// or minio:// bucket with a prefix, or a folder on a volume that all of them mount at the same path.
    Empty = nodes read and write the artifacts themselves."""
    image: str
    """Container image of the nodes: the project's gpu or cpu image."""
    kind: str = "pytorchjob"
    """`pytorchjob` (kubeflow.org/v1) or `trainjob` (Kubeflow Trainer 2.2 or newer)."""
    nodes: int = 2
    """Number of nodes, each a pod with nproc_per_node processes."""
    elastic: str = ""
    """`MIN:MAX` number of nodes with which the job can continue; empty = needs all nodes. For a pytorchjob only."""
    retries: int = 3
    """How often each node may be restarted after a failure; for a trainjob, its runtime decides this."""
    deadline: int = 86400
    """Seconds that the job may run, excluding time in the queue."""
    queue: str = ""
    """Kueue LocalQueue; empty = no queue."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime of a trainjob."""
    service_account: str = ""
    """ServiceAccount of the nodes, such as one with access to the bucket; empty = the namespace's default."""

    def __post_init__(self) -> None:
        check_not_empty("image", self.image)
        if self.handover:
            check_place("handover", self.handover)
        check_one_of("backend", self.backend, ("fsdp",))
        check_one_of("launcher", self.launcher, ("torchrun",))
        check_one_of("kind", self.kind, KINDS)
        for parameter in ("nodes", "deadline"):
            check_at_least(parameter, getattr(self, parameter), 1)
        check_at_least("retries", self.retries, 0)
        for parameter in ("queue", "service_account", "runtime"):
            value = getattr(self, parameter)
            if value and not LABEL.fullmatch(value):
                raise ValueError(f"{parameter} must be the name of a Kubernetes object, got {value}")
        self.node_range()
        super().__post_init__()

    def node_range(self) -> tuple[int, int] | None:
        """The minimum and maximum number of nodes of an elastic job; None for any other job.

        Raises:
            ValueError: `elastic` is invalid.
        """
        if not self.elastic:
            return None
        if self.kind != "pytorchjob":
            raise ValueError(f"elastic must be empty for kind {self.kind}, got {self.elastic}")
        found = re.fullmatch(r"(\d+):(\d+)", self.elastic)
        if not found or not 1 <= int(found[1]) <= self.nodes <= int(found[2]):
            raise ValueError(f"elastic must be MIN:MAX with 1 <= MIN <= nodes = {self.nodes} <= MAX, got {self.elastic}")
        return int(found[1]), int(found[2])


@dataclass(frozen=True, kw_only=True)
class NodeSettings(Settings):
    """What each node asks for and is limited to; in a pipeline, the sizes of the distill stage's pods."""

    gpus: int = 1
    """GPUs of each node; 0 runs it on the CPU."""
    cpu: str = "8"
    """CPUs of each node."""
    memory: str = "32Gi"
    """Memory of each node."""
    gpu_type: str = "nvidia.com/gpu"
    """Resource name of the GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gpus("gpus", self.gpus)
        check_cpu("cpu", self.cpu)
        check_memory("memory", self.memory)
        check_resource("gpu_type", self.gpu_type)


@dataclass(frozen=True, kw_only=True)
class DistillDistributedConfig(JobSettings, NodeSettings, DistillConfig):
    """Distil on many nodes: create a Kubeflow job, watch it and check its result."""

    artifacts: str = "{}"
    """Where the nodes read the inputs and write the result if there is no handover, as a JSON object: teacher_model,
    student_model, mask_file, train_data, eval_data, output_dir and, if it is given, output_mask_file (the folder with that
    file) → place. In a pipeline they are the artifacts' own."""
    pod: str = "{}"
    """Other settings of the nodes' pods as a JSON object: affinity, env, node_selector, tolerations, volume_mounts and volumes,
    in Kubernetes' own format. In a pipeline they are taken from the task."""
    job_file: str = ""
    """File to write the job's manifest to before it is submitted; empty = `<output_dir>.job.yaml`. If the job fails, the last
    lines of every node's log are saved beside it, in a folder of this name with the suffix `.logs`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for parameter in ("mix_data", "tensorboard_dir", "checkpoint_dir"):
            if value := getattr(self, parameter):
                raise ValueError(f"{parameter} must be empty for a job, got {value}: the nodes could not reach it")
        self.pod_settings()
        places = self.artifact_places()
        outputs = {"output_dir", *(["output_mask_file"] if self.output_mask_file else [])}
        if not self.handover and (missing := sorted({*self.inputs(), *outputs} - places.keys())):
            raise ValueError(
                f"handover must be given, or artifacts must have a place for {missing[0]}, got {shown(self.artifacts)}"
            )

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        for parameter, path in self.inputs().items():
            if not Path(path).is_dir():
                raise ValueError(f"{parameter} must be a folder for a job, got {path}")

    def check_folders(self) -> None:
        """Nothing to check here: they are folders of the nodes."""

    def inputs(self) -> dict[str, str]:
        """What the nodes read: parameter → path; for the mask, the path of its folder."""
        mask = Path(self.mask_file)
        paths = {
            "teacher_model": self.teacher_model,
            "student_model": self.student_model,
            "mask_file": str(mask if mask.is_dir() else mask.parent),
            "train_data": self.train_data,
        }
        return paths if self.skip_ppl_eval else paths | {"eval_data": self.eval_data}

    def artifact_places(self) -> dict[str, str]:
        """The places of `artifacts`.

        Raises:
            ValueError: `artifacts` is not a JSON object, or nodes cannot reach a place in it, for which there is `handover`.
        """
        places = parse_json(self.artifacts, "artifacts", dict[str, str])
        for parameter, place in places.items() if not self.handover else ():
            try:
                check_place(parameter, place)
            except ValueError as error:
                raise ValueError(f"handover must be given, since nodes cannot reach the artifact: {error}") from error
        return places

    def pod_settings(self) -> dict[str, Any]:
        """The nodes' resources, and their other pod settings that are not empty.

        Raises:
            ValueError: `pod` is not a JSON object, or has other settings.
        """
        settings = parse_json(self.pod, "pod", dict[str, Any])
        for name in settings.keys() - set(POD_SETTINGS):
            raise ValueError(f"pod must have settings among {', '.join(POD_SETTINGS)}, got {name}")
        amounts = {"cpu": self.cpu, "memory": self.memory} | ({self.gpu_type: str(self.gpus)} if self.gpus else {})
        given = {name: value for name, value in settings.items() if value}
        return given | {"resources": {"requests": amounts, "limits": amounts}}
