"""What a stage did and measured: kept in `compression.json`, in `<stage>_stats.json` and shown by the report."""

import importlib.metadata
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from components.core.files import read_json, write_json

RECORDED_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "optimum-quanto", "compressed-tensors", "kfp")


@dataclass
class StageRecord:
    """One step of a model's history.

    `measured` holds scalars: perplexity, sparsity, bytes, seconds, peak_memory_bytes, … `perplexity_text` names the text
    by fingerprint, so that two perplexities are compared or reused only on the same blocks. `details` holds long lists
    (loss by step, error by layer), which stay out of `compression.json`.
    """

    stage: str
    parameters: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    sparse_integrity_check: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The record as a dictionary, without the details."""
        return {name: value for name, value in asdict(self).items() if name != "details"}

    def save(self, path: Path) -> None:
        """Write the whole record as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "StageRecord":
        """Read a record.

        Raises:
            ValueError: the file is no record.
        """
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise ValueError(f"{path} must be a stage record: {error}") from error


class Stopwatch:
    """Seconds and peak memory since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        if gpu := _gpu():
            gpu.reset_peak_memory_stats()

    def read(self) -> dict[str, Any]:
        """`seconds`, `peak_memory_bytes` of the process and, on a GPU, `peak_gpu_memory_bytes`."""
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read = {
            "seconds": round(time.monotonic() - self.start, 3),
            "peak_memory_bytes": rss * (1 if sys.platform == "darwin" else 1024),
        }
        if gpu := _gpu():
            read["peak_gpu_memory_bytes"] = gpu.max_memory_allocated()
        return read


def _gpu() -> Any:
    """torch.cuda where a GPU is used; a stage that never imported torch uses none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the result."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def publish(record: StageRecord, metrics: Any, stats_path: str = "") -> None:
    """Log a record's numbers to a KFP `Metrics` artifact and, where there is a `stats_path`, write the whole record there."""
    for name, value in record.measured.items():
        if isinstance(value, int | float):
            metrics.log_metric(name, value)
    if stats_path:
        record.save(Path(stats_path))
