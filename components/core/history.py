"""What was done to a model: the record of each stage, and the model's history, which lists them in order.

A checkpoint has its history in `compression.json`: its source, and a summary of each step's record. Beside it are the whole
records of all steps, in `<stage>_stats.json`: every stage hands on those of the checkpoint that it starts from. The report and
publish stages read nothing else, so nothing here needs torch.
"""

import importlib.metadata
import platform
import re
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # what pydantic needs before Python 3.12

from components.core.checkpoint.files import weight_bytes
from components.core.files import write_json
from components.core.progress import log
from components.core.reading import read_json

HISTORY_FILE = "compression.json"
REPORT_PAGE, REPORT_SUMMARY = "report.html", "summary.json"  # written by the report stage, uploaded by the publish stage
RECORDED_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "optimum-quanto", "compressed-tensors", "kfp")

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]  # it becomes part of a file's name


class Step(TypedDict):
    """A record's summary, as JSON."""

    stage: StageName
    parameters: dict[str, Any]
    measured: NotRequired[dict[str, Any]]
    sparse_integrity_check: NotRequired[dict[str, Any] | None]
    versions: NotRequired[dict[str, str]]


class Record(Step):
    """A whole record, as JSON."""

    details: NotRequired[dict[str, Any]]


class Source(TypedDict):
    """The dense model that a model was made from."""

    model_id: str
    revision: str | None


class History(TypedDict):
    """The content of `compression.json`."""

    format: int
    source: Source
    steps: list[Step]


@dataclass
class StageRecord:
    """One step of a model's history.

    `measured` holds scalars: perplexity, sparsity, bytes, seconds, peak_memory_bytes, … `perplexity_text` is a
    fingerprint of the text, so that perplexities are only compared or reused if they were measured on the same blocks.
    `details` holds long lists (loss per step, error per layer), which are left out of `compression.json`.
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

    def is_step_of(self, other: "StageRecord") -> bool:
        """Whether both are records of one step, with or without its details."""
        return replace(self, details={}) == replace(other, details={})

    def save(self, path: Path) -> None:
        """Write the whole record as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "StageRecord":
        """Read a record.

        Raises:
            ValueError: the file is not a record.
        """
        return cls(**read_json(path, Record))


def read_history(folder: str | Path) -> History:
    """The content of `compression.json`; for a checkpoint without one, an empty history whose source is this folder.

    Raises:
        ValueError: the file is not a history.
    """
    path = Path(folder) / HISTORY_FILE
    if path.is_file():
        return read_json(path, History)
    return {"format": 1, "source": {"model_id": str(folder), "revision": None}, "steps": []}


def read_steps(folder: str | Path) -> list[StageRecord]:
    """The steps of a checkpoint's history, each with its details.

    Of a stage that ran several times, only the last step has them: earlier ones have had their whole record replaced.

    Raises:
        ValueError: a file is not a history or not a record.
    """
    history = read_history(folder)
    steps = [StageRecord(**step) for step in history["steps"]]
    for file in _record_files(folder, history):
        whole = StageRecord.load(file)
        same = [step for step in steps if step.is_step_of(whole)]
        for step in same:
            step.details = whole.details
        if not same:
            log(f"{file} is not the record of a step in {HISTORY_FILE}: it is left out")
    return steps


def write_history(folder: Path, history: History, record: StageRecord, made_from: str | Path) -> None:
    """Write `compression.json` with the record's summary as the last step, and the whole records of all steps beside it.

    Adds `bytes`, the size of the folder's weights, to the record's measurements.

    Args:
        folder: the new checkpoint.
        history: the history of the checkpoint that it was made from.
        record: the step that made it.
        made_from: that checkpoint's folder, which has the whole records of the earlier steps.
    """
    for file in _record_files(made_from, history):
        shutil.copyfile(file, folder / file.name)
    record.measured["bytes"] = weight_bytes(folder)
    write_json(folder / HISTORY_FILE, history | {"steps": [*history["steps"], record.summary()]})
    record.save(folder / stats_file(record.stage))


def stats_file(stage: str) -> str:
    """File name of a stage's record in its output folder, e.g. `distill_stats.json`."""
    return f"{stage}_stats.json"


def _record_files(folder: str | Path, history: History) -> list[Path]:
    """The files in a checkpoint's folder that hold whole records of steps in its history."""
    names = {stats_file(step["stage"]) for step in history["steps"]}
    return [file for file in sorted(Path(folder).glob(stats_file("*"))) if file.name in names and file.is_file()]


def known_perplexity(history: History, text: str) -> float | None:
    """The perplexity that the model's last step measured, if on the same text, so that it need not be measured again."""
    measured = history["steps"][-1].get("measured", {}) if history["steps"] else {}
    value = measured.get("perplexity")
    return value if measured.get("perplexity_text") == text and isinstance(value, float) else None


class Stopwatch:
    """Measures elapsed time and peak memory."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        if gpu := _gpu():
            gpu.reset_peak_memory_stats()

    def read(self) -> dict[str, Any]:
        """`seconds`, `peak_memory_bytes` of the process and, if it has used a GPU, `peak_gpu_memory_bytes`."""
        read = {
            "seconds": round(time.monotonic() - self.start, 3),
            "peak_memory_bytes": peak_memory(),
        }
        if gpu := _gpu():
            read["peak_gpu_memory_bytes"] = gpu.max_memory_allocated()
        return read


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return int(line) * 1024
    except OSError:  # not on Linux, where what follows would begin with the peak of the process that has started this one
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gpu() -> Any:
    """`torch.cuda` if this process uses it, otherwise None: to ask it for memory would make it take some of the first GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the result."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def log_metrics(record: StageRecord, metrics: Any, prefix: str = "") -> None:
    """Log a record's numbers to a KFP `Metrics` artifact.

    Args:
        record: what the stage returned.
        metrics: the artifact.
        prefix: in front of each name, where a run has the stage several times: KFP compares runs by stage and name.
    """
    for name, value in record.measured.items():
        if isinstance(value, int | float):
            metrics.log_metric(f"{prefix}{name}", value)
