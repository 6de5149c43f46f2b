"""Training speed of a second epoch with and without the cached teacher, on SmolLM2-135M.

    python tests/benchmarks/teacher_cache.py --student_model pruned --teacher_model dense --output_dir /tmp/cache

Both variants run in turn, as whole stages, so that a drifting machine touches both; the ratio is that of the second
epoch's tokens/s. Exits with 1 if it is under 1.25.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse
from components.core.files import check_new

GOAL = 1.25


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
    steps: int = 5
    """Optimizer steps an epoch, of 2 blocks of 512 tokens."""

    def __post_init__(self) -> None:
        check_new("output_dir", self.output_dir)


def second_epoch(config: CacheConfig, cache: str) -> float:
    """Tokens/s of the second epoch of a run with `teacher_cache=cache`."""
    output = Path(config.output_dir) / cache
    text = Path(config.output_dir) / "train.txt"
    command = [sys.executable, "-m", "components.distill", "--teacher_model", config.teacher_model]
    command += ["--student_model", config.student_model, "--mask_file", config.student_model, "--output_dir", str(output)]
    command += ["--train_data", str(text), "--seq_len", "512", "--epochs", "2", "--batch_size", "2", "--grad_accum_steps", "1"]
    command += ["--teacher_cache", cache, "--skip_ppl_eval"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps = json.loads((output / "distill_stats.json").read_text())["details"]["steps"]
    second = steps[len(steps) // 2 :]
    return len(second) * 1024 / sum(step["seconds"] for step in second)


def main() -> None:
    """Measure both and print the ratio."""
    config = parse(CacheConfig)
    Path(config.output_dir).mkdir(parents=True)
    write_text(config)
    speeds = {cache: second_epoch(config, cache) for cache in ("never", "always")}
    ratio = speeds["always"] / speeds["never"]
    print(f"second epoch: {speeds['never']:.1f} tokens/s without, {speeds['always']:.1f} with the cache, ratio {ratio:.2f}")
    raise SystemExit(ratio < GOAL)


def write_text(config: CacheConfig) -> None:
    """Cut the corpus to the text of `steps` optimizer steps."""
    from components.core.checkpoint import load_tokenizer
    from components.core.tokens import build_blocks

    tokenizer = load_tokenizer(config.teacher_model)
    blocks = build_blocks("train_data", config.train_data, "train", tokenizer, 512, 2 * config.steps + 1, 0)
    (Path(config.output_dir) / "train.txt").write_text(tokenizer.decode(blocks.ids.flatten()))


if __name__ == "__main__":
    main()
