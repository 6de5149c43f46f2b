"""The inputs of all hostile cases, made once: tiny models in each state of the pipeline, their masks, tokens and records."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from components.core.mask.mask import load_mask
from components.quantize import stage as quantize_stage
from components.quantize import with_compressed_tensors
from components.quantize.config import QuantizeConfig
from tests.conftest import save_tiny, tiny_model, tiny_tokenizer
from tests.hostile.harness import Running, flags, free_port

EVALUATION = {"eval_seq_len": 32, "eval_blocks": 4}
TRAINING = {"seq_len": 32, "batch_size": 2, "grad_accum_steps": 1, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Lab:
    """A folder with the inputs; cases must not change them."""

    root: Path

    def path(self, name: str) -> str:
        """The path of an input."""
        return str(self.root / name)

    def copy(self, name: str, place: Path) -> Path:
        """A copy of an input, to be changed."""
        source = self.root / name
        return Path((shutil.copytree if source.is_dir() else shutil.copy)(source, place / source.name))

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """The settings of a good run of a stage, with some changed; it writes to the working directory."""
        data = {"eval_data": self.path("tokens"), **EVALUATION}
        made: dict[str, dict[str, Any]] = {
            "resolve": {"model_id": self.path("dense"), "train_data": self.path("corpus"), "eval_data": self.path("corpus")},
            "fetch": {"model_id": self.path("dense"), "output_dir": "output"},
            "tokenize": {
                "model_dir": self.path("dense"),
                "output_dir": "output",
                "train_data": self.path("corpus"),
                "eval_data": self.path("corpus"),
                "nsamples": 4,
                "seq_len": 32,
                **EVALUATION,
            },
            "prune": {
                "dense_model": self.path("dense"),
                "output_dir": "output",
                "calibration_data": self.path("tokens"),
                "nsamples": 4,
                "seq_len": 32,
                **data,
            },
            "distill": {
                "teacher_model": self.path("dense"),
                "student_model": self.path("pruned"),
                "mask_file": self.path("pruned"),
                "output_dir": "output",
                "train_data": self.path("tokens"),
                "max_steps": 4,
                **TRAINING,
                **data,
            },
            "quantize": {
                "model_dir": self.path("distilled"),
                "mask_file": self.path("pruned"),
                "output_dir": "output",
                "calibration_data": self.path("tokens"),
                "nsamples": 4,
                "seq_len": 32,
                **data,
            },
            "evaluate": {"model_dir": self.path("pruned"), **data},
            "report": {"models": [self.path("int8"), self.path("fp8")], "output_dir": "output"},
            "publish": {
                "models": [self.path("int8")],
                "summary_dir": self.path("summary"),
                "publish_to": str(Path("place").absolute()),
            },
        }
        return made[name] | changes

    def make(self, name: str, folder: str, **changes: Any) -> None:
        """Run a stage whose output is an input of the cases."""
        settings = self.settings(name, **({"output_dir": self.path(folder)} if folder else {}) | changes)
        ended = Running(f"components.{name}", flags(settings), self.root).wait(timeout=600)
        assert ended.code == 0, f"{name}: {ended.out}{ended.err}"


def prepare(root: Path) -> Lab:
    """Make the inputs in an empty folder."""
    lab = Lab(root)
    save_tiny(root / "dense", "qwen3", tied=True)
    corpus = root / "corpus"
    corpus.mkdir()
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    for split, seed in (("train", 1), ("test", 2)):
        order = torch.randint(len(words), (700,), generator=torch.Generator().manual_seed(seed)).tolist()
        (corpus / f"{split}.txt").write_text(" ".join(words[index] for index in order))
    lab.make("tokenize", "tokens")
    lab.make("prune", "pruned")
    lab.make("prune", "pruned_by_two", nproc_per_node=2)
    lab.make("prune", "pruned_unevenly", allocation="search")
    lab.make("distill", "distilled", checkpoint_dir=lab.path("checkpoints"), checkpoint_steps=2)
    lab.make("distill", "distilled_cached", teacher_cache="always")
    for format in ("int8", "fp8", "packed-int8", "packed-int4"):
        lab.make("quantize", format, format=format)
    lab.make("report", "summary")
    lab.make("publish", "", publish_to=lab.path("published"), version="v1")
    lab.make("fetch", "fetched")
    _in_child(lambda: _more(root))
    # builds its extension once, which may take minutes and must not be killed: its lock would stay
    lab.make("distill", "with_deepspeed", backend="deepspeed", master_port=free_port())
    (root / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}))
    return lab


def _more(root: Path) -> None:
    """Inputs that no stage makes here: shards, an older mask, a checkpoint of compressed-tensors, texts in other formats."""
    model = tiny_model("qwen3", tied=True)
    model.save_pretrained(root / "sharded", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(root / "sharded")
    torch.save(dict(load_mask(root / "pruned").tensors), root / "mask.pt")
    quantize_stage.pick_engine = lambda *_, **__: with_compressed_tensors
    quantize_stage.run(QuantizeConfig(model_dir=str(root / "dense"), output_dir=str(root / "ct"), skip_ppl_eval=True))
    lines = [{"text": (root / "corpus" / "train.txt").read_text()[start : start + 100]} for start in range(0, 3000, 100)]
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    datasets.Dataset.from_list(lines).to_parquet(root / "train.parquet")


def _in_child(work: Callable[[], None]) -> None:
    """Do work in a forked process: threads that it starts must not be in the process from which cases are forked."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
