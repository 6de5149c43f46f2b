"""The inputs of all hostile cases, made once: tiny models in each state of the pipeline, their masks, tokens and records."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.conftest import save_tiny
from tests.hostile.harness import stage

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

    def settings(self, name: str, output: str = "output", **changes: Any) -> dict[str, Any]:
        """The settings of a good run of a stage, with some changed; it writes to the working directory."""
        data = {"eval_data": self.path("tokens"), **EVALUATION}
        made: dict[str, dict[str, Any]] = {
            "resolve": {"model_id": self.path("dense"), "train_data": self.path("corpus"), "eval_data": self.path("corpus")},
            "fetch": {"model_id": self.path("dense"), "output_dir": output},
            "tokenize": {
                "model_dir": self.path("dense"),
                "output_dir": output,
                "train_data": self.path("corpus"),
                "eval_data": self.path("corpus"),
                "nsamples": 4,
                "seq_len": 32,
                **EVALUATION,
            },
            "prune": {
                "dense_model": self.path("dense"),
                "output_dir": output,
                "calibration_data": self.path("tokens"),
                "nsamples": 4,
                "seq_len": 32,
                **data,
            },
            "distill": {
                "teacher_model": self.path("dense"),
                "student_model": self.path("pruned"),
                "mask_file": self.path("pruned"),
                "output_dir": output,
                "train_data": self.path("tokens"),
                "max_steps": 4,
                **TRAINING,
                **data,
            },
            "quantize": {
                "model_dir": self.path("distilled"),
                "mask_file": self.path("pruned"),
                "output_dir": output,
                **data,
            },
            "evaluate": {"model_dir": self.path("pruned"), **data},
            "report": {"records": [self.path("int8")], "output_dir": output},
            "publish": {
                "models": self.path("int8"),
                "summary_dir": self.path("summary"),
                "publish_to": Path("place").absolute(),
            },
        }
        return made[name] | changes

    def make(self, name: str, folder: str, **changes: Any) -> None:
        """Run a stage whose output is an input of the cases."""
        settings = self.settings(name, self.path(folder), **changes)
        ended = stage(name, settings, self.root)
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
    lab.make("distill", "distilled", checkpoint_dir=lab.path("checkpoints"), checkpoint_steps=2)
    for format in ("int8", "fp8"):
        lab.make("quantize", format, format=format)
    lab.make("report", "summary")
    (root / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}))
    return lab
