"""How much of a model's quality distillation recovers: dense, pruned, distilled, and the dense model trained the same way.

    python tests/benchmarks/recovery.py --train_data valid.txt --eval_data test.txt --output_dir /tmp/recovery

Prunes SmolLM2-135M to 70 % on 32 blocks of 512 tokens, distils it under its mask and, as a control, trains the same layers
of the dense model on the same text for the same number of steps, since training on a corpus lowers the perplexity on it
even where nothing is recovered. Perplexity is measured on the first 16 evaluation blocks of 512 tokens.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse
from components.core.files import check_new

EVALUATION = ["--eval_blocks", "16", "--eval_seq_len", "512"]


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Settings of the benchmark."""

    train_data: str
    """Corpus for calibration and training."""
    eval_data: str
    """Corpus for perplexity."""
    output_dir: str
    """Folder to create."""
    max_steps: int = 60
    """Optimizer steps of 4 blocks of 512 tokens."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    dtype: str = "float32"
    """Number format for the computation."""
    control: bool = True
    """Also train the dense model."""

    def __post_init__(self) -> None:
        check_new("output_dir", self.output_dir)


def stage(name: str, *flags: str) -> float:
    """Run a stage as a user would; return the seconds it took."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", f"components.{name}", *flags], check=True)
    return time.monotonic() - start


def measured(folder: Path, name: str) -> dict[str, float]:
    """What a stage measured."""
    found: dict[str, float] = json.loads((folder / f"{name}_stats.json").read_text())["measured"]
    return found


def main() -> None:
    """Run the stages and print the table."""
    config = parse(RecoveryConfig)
    root = Path(config.output_dir)
    root.mkdir(parents=True)
    data = ["--eval_data", config.eval_data, *EVALUATION]
    stage("fetch", "--model_id", "builtin:smollm2-135m", "--output_dir", str(root / "dense"))
    prune = ["--dense_model", str(root / "dense"), "--output_dir", str(root / "pruned"), "--nsamples", "32"]
    stage("prune", *prune, "--calibration_data", config.train_data, *data)
    train = ["--teacher_model", str(root / "dense"), "--mask_file", str(root / "pruned"), "--train_data", config.train_data]
    train += ["--max_steps", str(config.max_steps), "--learning_rate", str(config.learning_rate), "--dtype", config.dtype]
    train += ["--batch_size", "2", "--grad_accum_steps", "2", "--epochs", "4", "--teacher_cache", "never", *data]
    minutes = stage("distill", *train, "--student_model", str(root / "pruned"), "--output_dir", str(root / "distilled")) / 60
    if config.control:
        stage("distill", *train, "--student_model", str(root / "dense"), "--output_dir", str(root / "control"), "--no_mask")
    pruned, distilled = measured(root / "pruned", "prune"), measured(root / "distilled", "distill")
    print(f"dense                 {pruned['perplexity_before']:8.2f}")
    print(f"pruned                {pruned['perplexity']:8.2f}")
    speed = f"{minutes:.1f} minutes, {distilled['tokens_per_second']} tokens/s"
    print(f"distilled             {distilled['perplexity']:8.2f}  {speed}")
    if config.control:
        print(f"dense, trained alike  {measured(root / 'control', 'distill')['perplexity']:8.2f}")
    print(f"distilled / pruned    {distilled['perplexity'] / pruned['perplexity']:8.2f}")


if __name__ == "__main__":
    main()
