"""Peak memory of distillation on four processes with FSDP against one process without, on a random model.

    python tests/benchmarks/sharded_memory.py --output_dir /tmp/sharded

Prints each process's peak over what it has after its imports, at the end of loading, of training and of saving. Exits with 1 if
one of the four has more than 0.45 of the single process's at any of these. In both, glibc returns freed memory to the system at
once, so that what is measured is what the tensors take; FSDP frees a block's gathered weights in many small pieces.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse
from components.core.files import check_new
from tests.benchmarks.models import make_model

GOAL = 0.45
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
MOMENTS = ("loading", "training", "saving")
PROGRAM = """
import json, os, runpy
from components.core.history import peak_memory
import components.distill.stage as stage
from components.distill.loop import Trainer

imports, peaks = peak_memory(), {}
fit, step = Trainer.fit, Trainer.step
def loaded(self):
    peaks["loading"] = peak_memory() - imports
    result = fit(self)
    peaks["training"] = peak_memory() - imports
    return result
Trainer.fit = loaded
runpy.run_module("components.distill", run_name="__main__", alter_sys=False)
peaks["saving"] = peak_memory() - imports
with open(f"{os.environ['PEAKS']}-{os.environ.get('RANK', '0')}.json", "w") as file:
    json.dump(peaks, file)
"""


@dataclass(frozen=True, kw_only=True)
class ShardedConfig:
    """Settings of the benchmark."""

    output_dir: str
    """Folder to create; needs about 8 GB of disk."""
    layers: int = 24
    """Depth of the model; 24 make 0.75 GB of bfloat16."""
    steps: int = 2
    """Optimizer steps."""

    def __post_init__(self) -> None:
        check_new("output_dir", self.output_dir)


def peaks(place: Path, name: str, processes: int, steps: int) -> list[dict[str, int]]:
    """Distil; returns each process's peaks by moment."""
    (place / "program.py").write_text(PROGRAM)
    command = [str(place / "program.py")]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]
    command += ["--teacher_model", str(place / "dense"), "--student_model", str(place / "pruned")]
    command += ["--mask_file", str(place / "pruned"), "--output_dir", str(place / name), "--train_data", "builtin:python-docs"]
    command += ["--seq_len", "64", "--batch_size", "1", "--grad_accum_steps", str(4 // processes), "--max_steps", str(steps)]
    command += ["--skip_ppl_eval", "--backend", "fsdp" if processes > 1 else "none"]
    environment = os.environ | {"PEAKS": str(place / name), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd()), **RETURNED}
    subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return [json.loads(Path(f"{place / name}-{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    """Measure both and print a table."""
    config = parse(ShardedConfig)
    place = Path(config.output_dir)
    make_model(place / "dense", config.layers, vocabulary=1024)
    prune = ["--dense_model", str(place / "dense"), "--output_dir", str(place / "pruned"), "--method", "magnitude"]
    prune += ["--calibration_data", "builtin:python-docs", "--nsamples", "1", "--seq_len", "16", "--skip_ppl_eval"]
    subprocess.run([sys.executable, "-m", "components.prune", *prune], check=True, stdout=subprocess.DEVNULL)
    (one,), four = (peaks(place, name, count, config.steps) for name, count in (("one", 1), ("four", 4)))
    worst = 0.0
    for moment in MOMENTS:
        largest = max(rank[moment] for rank in four)
        worst = max(worst, largest / one[moment])
        ratio = largest / one[moment]
        print(f"{moment}: {one[moment] / 1e9:.2f} GB in one process, {largest / 1e9:.2f} GB in one of four: {ratio:.2f}")
    raise SystemExit(worst > GOAL)


if __name__ == "__main__":
    main()
