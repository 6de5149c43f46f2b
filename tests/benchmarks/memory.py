"""Peak memory of prune, quantize and evaluate on a random model that is larger than it.

    python tests/benchmarks/memory.py --output_dir /tmp/memory

Makes a checkpoint of Qwen3-0.6B's shape, but deeper (2.1 GB of bfloat16 in shards of at most 500 MB), and one of twice that
depth. Prints for each stage its peak over that of a process that has imported the same and does nothing. Exits with 1 if one is
above 1.2 GB, or if the deeper model takes more than 10 % more.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from components.core.checkpoint.files import INDEX_FILE
from components.core.cli import parse
from components.core.files import check_new
from tests.conftest import tiny_tokenizer

LIMIT, GROWTH = 1.2e9, 1.1
SHARD = 500_000_000
TEXT = ["--nsamples", "8", "--seq_len", "512"]
EVALUATION = ["--eval_blocks", "8", "--eval_seq_len", "512", "--eval_data", "builtin:python-docs"]
# runs `main` of a stage's package, or nothing, and prints the peak of the whole process
PROGRAM = """
import resource, runpy, sys
import components.{stage}.stage, components.core.cli, optimum.quanto
if len(sys.argv) > 1:
    runpy.run_module("components.{stage}", run_name="__main__", alter_sys=False)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
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


def make_model(folder: Path, layers: int) -> int:
    """Write a random checkpoint, a shard at a time; returns its size in bytes."""
    folder.mkdir(parents=True)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = 0

    def write() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=generator)
        if sum(tensor.nbytes for tensor in shard.values()) + 2 * weight.numel() > SHARD:
            write()
        shard[name] = weight.bfloat16()
        total += shard[name].nbytes
    write()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def peak(stage: str, flags: list[str]) -> int:
    """Peak memory of a process that runs a stage, or without flags only imports it, in bytes."""
    command = [sys.executable, "-c", PROGRAM.format(stage=stage), *flags]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(ended.stdout.splitlines()[-1].split()[1])


def main() -> None:
    """Measure all stages on both models and print a table."""
    config = parse(MemoryConfig)
    place = Path(config.output_dir)
    taken: dict[str, list[float]] = {}
    for depth in (config.layers, 2 * config.layers):
        size = make_model(place / "dense", depth)
        print(f"{depth} layers, {size / 1e9:.2f} GB", flush=True)
        common = ["--calibration_data", "builtin:python-docs", "--method", config.method, *TEXT, *EVALUATION]
        model = str(place / "dense")
        commands = {
            "prune": ["--dense_model", model, "--output_dir", str(place / "pruned"), *common],
            "quantize": ["--model_dir", str(place / "pruned"), "--output_dir", str(place / "int8"), *EVALUATION],
            "evaluate": ["--model_dir", model, *EVALUATION],
        }
        for stage, flags in commands.items():
            used = peak(stage, flags) - peak(stage, [])
            taken.setdefault(stage, []).append(used)
            print(f"  {stage}: {used / 1e9:.3f} GB over an idle process", flush=True)
        for folder in ("dense", "pruned", "int8"):
            shutil.rmtree(place / folder)
    for stage, (smaller, deeper) in taken.items():
        print(f"{stage}: {smaller / 1e9:.3f} GB (at most {LIMIT / 1e9:.1f}), at twice the depth × {deeper / smaller:.2f}")
    raise SystemExit(any(smaller > LIMIT or deeper > GROWTH * smaller for smaller, deeper in taken.values()))


if __name__ == "__main__":
    main()
