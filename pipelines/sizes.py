"""The parameters for the sizes of a run's pods."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from components.core.checks import AUTO, check_cpu, check_gpus, check_memory, check_memory_or_auto, check_resource
from components.core.settings import Settings
from components.distill_distributed.config import NodeSettings

# last word of a parameter's name → its check
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "gpus": check_gpus,
    "cpu": check_cpu,
    "memory": check_memory,
    "type": check_resource,
}


@dataclass(frozen=True, kw_only=True)
class PodSettings(Settings):
    """The resources of a run's pods."""

    gpu_type: str = NodeSettings.gpu_type
    """Resource name of the GPUs."""
    prune_gpus: int = 1
    """GPUs of the prune stage; 0 runs it on the CPU."""
    prune_cpu: str = "4"
    """CPU limit of the prune stage."""
    prune_memory: str = AUTO
    """Memory limit of the prune stage; `auto` = by the sizes of the model."""
    distill_gpus: int = NodeSettings.gpus
    """GPUs of the distill stage, or of each node if there are several; 0 runs it on the CPU."""
    distill_cpu: str = NodeSettings.cpu
    """CPU limit of the distill stage, or of each node if there are several."""
    distill_memory: str = AUTO
    """Memory limit of the distill stage, or of each node if there are several; `auto` = by the sizes of the model."""
    quantize_gpus: int = 1
    """GPUs of each quantize stage; 0 runs it on the CPU."""
    quantize_cpu: str = "4"
    """CPU limit of each quantize stage."""
    quantize_memory: str = AUTO
    """Memory limit of each quantize stage; `auto` = by the sizes of the model."""
    light_cpu: str = "2"
    """CPU limit of resolve, fetch, tokenize, report and publish, and of the launcher of a job on many nodes."""
    light_memory: str = "8Gi"
    """Memory limit of resolve, fetch, tokenize, report and publish, and of the launcher of a job on many nodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in fields(self):
            check = check_memory_or_auto if entry.default == AUTO else CHECKS[entry.name.rpartition("_")[2]]
            check(entry.name, getattr(self, entry.name))
