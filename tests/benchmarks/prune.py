"""Perplexity, time and memory of pruning a real model: presets, methods and patterns, beside the reference implementation.

    python tests/benchmarks/prune.py --calibration_data valid.txt --eval_data test.txt --output_dir /tmp/prune

Every row prunes SmolLM2-135M on 32 blocks of 512 tokens, as its user would, and measures the first 16 blocks of 512 tokens of
the evaluation text. The first row is a plain transcription of SparseGPT's published code (Frantar & Alistarh 2023): one
sequence at a time through a block, and a Hessian, its factors and a pass over the columns for each linear layer. Its time too
includes reading the model and both perplexities. Rows that are finished are not run again by the same command. Besides the
table there is a picture, prune.svg, of perplexity against time.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, nn

from components.core.blocks import find_blocks
from components.core.checkpoint.loading import load_model, load_tokenizer
from components.core.cli import parse
from components.core.history import peak_memory
from components.core.models import SMOLLM2, local_folder
from components.core.perplexity import perplexity
from components.core.tokens import load_blocks

LENGTH, NSAMPLES, EVAL_BLOCKS = 512, 32, 16
PRESETS = {effort: ["--effort", effort] for effort in ("fast", "balanced", "best")}
METHODS = {method: ["--method", method, "--refit", "0"] for method in ("magnitude", "wanda", "sparsegpt")}
SEEDS = {f"{name}, seed {seed}": [*flags, "--seed", str(seed)] for name, flags in PRESETS.items() for seed in (1, 2)}
PATTERNS = {
    "2:4": ["--pattern", "2:4", "--sparsity", "0.5"],
    **{f"{share} %": ["--sparsity", str(share / 100)] for share in (50, 60, 80)},
}
ROWS = {
    **METHODS,
    "alps": ["--method", "alps", "--refit", "10"],
    **PRESETS,
    **SEEDS,
    **{
        f"{name}, {pattern}": [*flags, *more]
        for pattern, more in PATTERNS.items()
        for name, flags in (METHODS | PRESETS).items()
    },
}
REFERENCE, LLM_COMPRESSOR = "reference", "llm-compressor"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of the benchmark."""

    calibration_data: str
    """Corpus for calibration."""
    eval_data: str
    """Corpus for perplexity."""
    output_dir: str
    """Folder for the results: a file for each row."""
    rows: list[str] = field(default_factory=lambda: [REFERENCE, *METHODS, "alps", *PRESETS])
    """Which rows to run. There are also the presets with other seeds, as in `fast, seed 1`, all methods and presets with other
    sparsities, as in `best, 2:4` and `wanda, 50 %`, and `llm-compressor`."""
    llm_compressor: str = ""
    """Python of an environment that has llmcompressor, for the row of this name."""

    def __post_init__(self) -> None:
        names = (REFERENCE, LLM_COMPRESSOR, *ROWS)
        for row in self.rows:
            if row not in names:
                raise ValueError(f"rows must be of {', '.join(names)}, got {row}")
        if LLM_COMPRESSOR in self.rows and not Path(self.llm_compressor).is_file():
            raise ValueError(f"llm_compressor must be a Python for the row {LLM_COMPRESSOR}, got {self.llm_compressor!r}")


class Layer:
    """The Hessian of one linear layer, and what the published code does with it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.columns, self.tokens = layer, layer.weight.shape[1], 0
        self.hessian = torch.zeros(self.columns, self.columns)

    def add(self, x: Tensor) -> None:
        """Add one sequence [seq_len, in]."""
        self.hessian *= self.tokens / (self.tokens + 1)
        self.tokens += 1
        x = (2 / self.tokens) ** 0.5 * x.t()
        self.hessian += x.matmul(x.t())

    def prune(self, sparsity: float, blocksize: int = 128, percdamp: float = 0.01) -> None:
        """Prune it in place."""
        weight, hessian = self.layer.weight.data.clone(), self.hessian
        dead = torch.diag(hessian) == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        diagonal = torch.arange(self.columns)
        hessian[diagonal, diagonal] += percdamp * torch.mean(torch.diag(hessian))
        inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        for start in range(0, self.columns, blocksize):
            end = min(start + blocksize, self.columns)
            block, local = weight[:, start:end].clone(), inverse[start:end, start:end]
            pruned, errors = torch.zeros_like(block), torch.zeros_like(block)
            scores = block**2 / torch.diag(local).reshape((1, -1)) ** 2
            threshold = torch.sort(scores.flatten())[0][int(scores.numel() * sparsity)]
            mask = scores <= threshold
            for column in range(end - start):
                kept = block[:, column].clone()
                kept[mask[:, column]] = 0
                pruned[:, column] = kept
                error = (block[:, column] - kept) / local[column, column]
                block[:, column:] -= error.unsqueeze(1).matmul(local[column, column:].unsqueeze(0))
                errors[:, column] = error
            weight[:, start:end] = pruned
            weight[:, end:] -= errors.matmul(inverse[start:end, end:])
        self.layer.weight.data = weight


@torch.no_grad()
def prune_like_the_reference(model: nn.Module, ids: Tensor, sparsity: float) -> None:
    """Prune a model in place, block by block, by the published code."""
    _, blocks = find_blocks("model", model)
    inputs: list[Tensor] = []
    arguments: list[dict[str, object]] = []

    class CaughtError(Exception):
        pass

    def catch(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, object]) -> None:
        inputs.append(args[0])
        arguments.append(named)
        raise CaughtError

    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids:
        try:
            model(row[None], use_cache=False)
        except CaughtError:
            continue
    handle.remove()
    for block in blocks:
        found = [Layer(layer) for layer in block.modules() if isinstance(layer, nn.Linear)]
        handles = [each.layer.register_forward_hook(lambda _, args, __, each=each: each.add(args[0][0])) for each in found]
        for hidden, named in zip(inputs, arguments, strict=True):
            block(hidden, **named)
        for handle in handles:
            handle.remove()
        for each in found:
            each.prune(sparsity)
        inputs = [block(hidden, **named) for hidden, named in zip(inputs, arguments, strict=True)]


def other(config: BenchConfig, row: str) -> dict[str, float]:
    """Measure what is not ours: the reference, or llm-compressor."""
    start = time.monotonic()
    folder = local_folder(SMOLLM2)
    tokenizer = load_tokenizer(folder)
    calibration = load_blocks(
        "calibration_data", config.calibration_data, "calibration", tokenizer, "auto", LENGTH, NSAMPLES, 0
    )
    evaluation = load_blocks("eval_data", config.eval_data, "eval", tokenizer, "auto", LENGTH, EVAL_BLOCKS)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    found = {"perplexity_before": perplexity(model, evaluation.ids)}
    if row == REFERENCE:
        prune_like_the_reference(model, calibration.ids, 0.7)
        memory = peak_memory()
    else:
        with tempfile.TemporaryDirectory(dir=config.output_dir) as place:
            save_file({"ids": calibration.ids}, f"{place}/ids")
            script = Path(__file__).with_name("llm_compressor.py")
            command = [config.llm_compressor, str(script), str(folder), f"{place}/ids", f"{place}/model"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            memory = int(done.stdout.splitlines()[-1])
            model.load_state_dict(load_model(f"{place}/model", torch.float32, torch.device("cpu")).state_dict())
    found["perplexity"] = perplexity(model, evaluation.ids)
    return found | {"seconds": time.monotonic() - start, "peak_memory_bytes": memory}


def stage(config: BenchConfig, row: str) -> dict[str, float]:
    """Measure a run of the prune stage."""
    output = Path(config.output_dir) / "model"
    flags = ["--dense_model", SMOLLM2, "--output_dir", str(output), "--nsamples", str(NSAMPLES), "--seq_len", str(LENGTH)]
    flags += ["--eval_blocks", str(EVAL_BLOCKS), "--eval_seq_len", str(LENGTH), *ROWS[row]]
    flags += ["--calibration_data", config.calibration_data, "--eval_data", config.eval_data]
    subprocess.run([sys.executable, "-m", "components.prune", *flags], check=True)
    found: dict[str, float] = json.loads((output / "prune_stats.json").read_text())["measured"]
    shutil.rmtree(output)
    return found


def draw(found: dict[str, dict[str, float]], file: Path) -> None:
    """Draw perplexity against time, both logarithmic; rows whose model has collapsed would only hide the others."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds", ylabel="perplexity", xscale="log", yscale="log")
    best = min(row["perplexity"] for row in found.values())
    for name, row in found.items():
        if row["perplexity"] <= 4 * best:
            axes.plot(row["seconds"], row["perplexity"], "o")
            axes.annotate(name, (row["seconds"], row["perplexity"]), (6, 4), textcoords="offset points")
    axes.margins(0.15)
    axes.grid(which="both", linewidth=0.3)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run the rows that are missing, print the table, and draw the picture."""
    config = parse(BenchConfig)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'':24} {'dense':>8} {'pruned':>8} {'seconds':>8} {'peak GB':>8}", flush=True)
    rows: dict[str, dict[str, float]] = {}
    for row in config.rows:
        file = folder / f"{row.replace(' ', '-')}.json"
        if not file.is_file():
            file.write_text(json.dumps(stage(config, row) if row in ROWS else other(config, row)))
        found = rows[row] = json.loads(file.read_text())
        dense, pruned, seconds = (found[name] for name in ("perplexity_before", "perplexity", "seconds"))
        print(f"{row:24} {dense:8.2f} {pruned:8.2f} {seconds:8.0f} {found['peak_memory_bytes'] / 1e9:8.2f}", flush=True)
    draw(rows, folder / "prune.svg")


if __name__ == "__main__":
    main()
