"""Training speed of the second epoch with and without the teacher cache, on SmolLM2-135M.

    python tests/benchmarks/teacher_cache.py --student_model pruned --teacher_model dense --output_dir /tmp/cache

Each round runs whole stages in the order without, with, with, without, so that drift of the machine affects both equally;
the ratio is that of the median step times of all second epochs. Exits with 1 if it is below 1.25.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse
from components.core.files import check_new

GOAL = 1.25
TOKENS = 4 * 512  # per optimizer step


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of the benchmark."""

    teacher_model: str
    """Folder with the dense model."""
    student_model: str
    """Folder with the pruned model and its mask."""
    output_dir: str
    """Folder to create."""
    train_data: str = "builtin:python-docs"
    """Corpus for training."""
    steps: int = 4
    """Optimizer steps per epoch, each of 4 blocks of 512 tokens."""
    rounds: int = 1
    """How many rounds to run."""

    def __post_init__(self) -> None:
        check_new("output_dir", self.output_dir)


def second_epoch(config: CacheConfig, cache: str, name: str) -> list[float]:
    """Seconds for each step in the second epoch of a run with `teacher_cache=cache`."""
    output = Path(config.output_dir) / name
    text = Path(config.output_dir) / "train.txt"
    command = [sys.executable, "-m", "components.distill", "--teacher_model", config.teacher_model]
    command += ["--student_model", config.student_model, "--mask_file", config.student_model, "--output_dir", str(output)]
    command += ["--train_data", str(text), "--seq_len", "512", "--epochs", "2", "--batch_size", "4", "--grad_accum_steps", "1"]
    command += ["--teacher_cache", cache, "--skip_ppl_eval"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps = json.loads((output / "distill_stats.json").read_text())["details"]["steps"]
    return [step["seconds"] for step in steps[len(steps) // 2 :]]


def main() -> None:
    """Measure both and print the ratio."""
    config = parse(CacheConfig)
    Path(config.output_dir).mkdir(parents=True)
    write_text(config)
    seconds: dict[str, list[float]] = {"never": [], "always": []}
    for part, cache in enumerate(["never", "always", "always", "never"] * config.rounds):
        seconds[cache] += second_epoch(config, cache, f"{part}-{cache}")
        print(f"{cache}: {seconds[cache]}", flush=True)
    without, cached = (TOKENS / statistics.median(seconds[cache]) for cache in ("never", "always"))
    ratio = cached / without
    print(f"second epoch: {without:.1f} tokens/s without, {cached:.1f} with the cache, ratio {ratio:.2f}")
    raise SystemExit(ratio < GOAL)


def write_text(config: CacheConfig) -> None:
    """Cut the corpus down to the text for `steps` optimizer steps."""
    from components.core.checkpoint.loading import load_tokenizer
    from components.core.tokens import build_blocks

    tokenizer = load_tokenizer(config.teacher_model)
    blocks = build_blocks("train_data", config.train_data, "train", tokenizer, "never", 512, 4 * config.steps + 1, 0)
    (Path(config.output_dir) / "train.txt").write_text(tokenizer.decode(blocks.ids.flatten()))


if __name__ == "__main__":
    main()
