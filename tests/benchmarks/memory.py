"""Peak memory of prune, quantize and evaluate on a random model that is larger than it.

    python tests/benchmarks/memory.py --output_dir /tmp/memory

Makes a checkpoint of Qwen3-0.6B's shape, but deeper (2.1 GB of bfloat16 in shards of at most 500 MB), and one of twice that
depth. Prints for each stage its peak over that of a process that has imported the same and does nothing, and what the resolve
stage computes for it. Exits with 1 if one is above 1.2 GB, or if the deeper model takes more than 10 % more or less.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse
from components.core.files import check_new
from components.resolve.shape import model_shape
from components.resolve.sizing import STAGES
from pipelines.size_tables import defaults
from tests.benchmarks.models import make_model

LIMIT, TOLERANCE = 1.2e9, 0.1
TEXT = {"nsamples": 4, "seq_len": 512}
EVALUATION = {"eval_blocks": 4, "eval_seq_len": 512}
ON_CPU = {"prune_gpus": 0, "quantize_gpus": 0}
NOT_MEASURED = ("a process", "files just written")
# runs `main` of a stage's package, or nothing, and prints the peak of the whole process
PROGRAM = """
import runpy, sys
from components.core.history import peak_memory
import components.{stage}.stage, components.core.cli, optimum.quanto
if len(sys.argv) > 1:
    runpy.run_module("components.{stage}", run_name="__main__", alter_sys=False)
print("peak", peak_memory())
"""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Settings of the benchmark."""

    output_dir: str
    """Folder to create; needs about 20 GB of disk."""
    layers: int = 57
    """Depth of the smaller model; 57 make 2.1 GB."""
    method: str = "sparsegpt"
    """Method of pruning."""

    def __post_init__(self) -> None:
        check_new("output_dir", self.output_dir)


def peak(stage: str, flags: list[str]) -> int:
    """Peak memory of a process that runs a stage, or without flags only imports it, in bytes."""
    command = [sys.executable, "-c", PROGRAM.format(stage=stage), *flags]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(ended.stdout.splitlines()[-1].split()[1])


def computed(stage: str, folder: Path) -> float:
    """What the resolve stage computes for a stage without what every process takes, in bytes."""
    need = STAGES[stage](model_shape(str(folder), ""), defaults("compress") | TEXT | EVALUATION | ON_CPU)
    return sum(needed for term, needed in need.host.items() if term not in NOT_MEASURED)


def flags_of(values: dict[str, int]) -> list[str]:
    """Values as flags."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def too_much(smaller: float, deeper: float) -> bool:
    """Whether a stage's peaks for the model and for one of twice its depth, in bytes, miss the goal."""
    return smaller > LIMIT or abs(deeper - smaller) > TOLERANCE * smaller


def main() -> None:
    """Measure all stages on both models and print a table."""
    config = parse(MemoryConfig)
    place = Path(config.output_dir)
    taken: dict[str, list[float]] = {}
    for depth in (config.layers, 2 * config.layers):
        size = make_model(place / "dense", depth)
        print(f"{depth} layers, {size / 1e9:.2f} GB", flush=True)
        evaluation = [*flags_of(EVALUATION), "--eval_data", "builtin:python-docs"]
        common = ["--calibration_data", "builtin:python-docs", "--method", config.method, *flags_of(TEXT), *evaluation]
        common += ["--refit", "2"]  # of which more would take time, but no more memory
        model = str(place / "dense")
        commands = {
            "prune": ["--dense_model", model, "--output_dir", str(place / "pruned"), *common],
            "quantize": ["--model_dir", str(place / "pruned"), "--output_dir", str(place / "int8"), *evaluation],
            "evaluate": ["--model_dir", model, *evaluation],
        }
        for stage, flags in commands.items():
            expected = f", {computed(stage, place / 'dense') / 1e9:.3f} GB computed" if stage in STAGES else ""
            used = peak(stage, flags) - peak(stage, [])
            taken.setdefault(stage, []).append(used)
            print(f"  {stage}: {used / 1e9:.3f} GB over an idle process{expected}", flush=True)
        for folder in ("dense", "pruned", "int8"):
            shutil.rmtree(place / folder)
    for stage, (smaller, deeper) in taken.items():
        print(f"{stage}: {smaller / 1e9:.3f} GB (at most {LIMIT / 1e9:.1f}), at twice the depth × {deeper / smaller:.2f}")
    raise SystemExit(any(too_much(*peaks) for peaks in taken.values()))


if __name__ == "__main__":
    main()
