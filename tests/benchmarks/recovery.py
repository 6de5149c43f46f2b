"""How much of a model's quality distillation recovers: dense, pruned, distilled, and the dense model trained the same way.

    python tests/benchmarks/recovery.py --train_data valid.txt --eval_data test.txt --output_dir /tmp/recovery

Prunes SmolLM2-135M to 70 % on 32 blocks of 512 tokens, distils it under its mask and, as a control, trains the same layers
of the dense model on the same text for the same number of steps, since training on a corpus lowers the perplexity on it
even where nothing is recovered. Perplexity is measured on the first 16 evaluation blocks of 512 tokens. Stages that are
finished are not run again by the same command.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from components.core.cli import parse

EVALUATION = ["--eval_blocks", "16", "--eval_seq_len", "512"]


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Settings of the benchmark."""

    train_data: str
    """Corpus for calibration and training."""
    eval_data: str
    """Corpus for perplexity."""
    output_dir: str
    """Folder for the models."""
    effort: str = "best"
    """Preset of pruning."""
    max_steps: int = 110
    """Optimizer steps of 4 blocks of 512 tokens."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    alpha_hidden: float = 0.0
    """Weight of the term on hidden states."""
    dtype: str = "bfloat16"
    """Number format in which training multiplies."""
    control: bool = True
    """Also train the dense model."""


def stage(name: str, output: Path, *flags: str) -> dict[str, float]:
    """What a stage measures, run as a user would; it is not run again if it has been."""
    if not output.is_dir():
        subprocess.run([sys.executable, "-m", f"components.{name}", "--output_dir", str(output), *flags], check=True)
    file = output / f"{name}_stats.json"
    found: dict[str, float] = json.loads(file.read_text())["measured"] if file.is_file() else {}
    return found


def main() -> None:
    """Run the stages and print the table."""
    config = parse(RecoveryConfig)
    root = Path(config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    data = ["--eval_data", config.eval_data, *EVALUATION]
    dense = root / "dense"
    stage("fetch", dense, "--model_id", "builtin:smollm2-135m")
    prune = ["--dense_model", str(dense), "--calibration_data", config.train_data, "--nsamples", "32", "--seq_len", "512"]
    pruned = stage("prune", root / "pruned", *prune, "--effort", config.effort, *data)
    train = ["--teacher_model", str(dense), "--mask_file", str(root / "pruned"), "--train_data", config.train_data]
    train += ["--max_steps", str(config.max_steps), "--learning_rate", str(config.learning_rate), "--dtype", config.dtype]
    train += ["--batch_size", "4", "--grad_accum_steps", "1", "--epochs", "4", "--seq_len", "512", *data]
    train += ["--alpha_hidden", str(config.alpha_hidden)]
    distilled = stage("distill", root / "distilled", *train, "--student_model", str(root / "pruned"))
    rows = [("dense", pruned["perplexity_before"], 0.0), ("pruned", pruned["perplexity"], pruned["seconds"])]
    rows.append(("distilled", distilled["perplexity"], distilled["seconds"]))
    if config.control:
        control = stage("distill", root / "control", *train, "--student_model", str(dense), "--no_mask")
        rows.append(("dense, trained alike", control["perplexity"], control["seconds"]))
    for name, perplexity, seconds in rows:
        print(f"{name:22}{perplexity:8.2f}{seconds:8.0f} s")
    if config.control:
        print(f"{'distilled / control':22}{distilled['perplexity'] / control['perplexity']:8.3f}")


if __name__ == "__main__":
    main()
