"""Checkpoints with a history, and a report, as the earlier stages leave them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from components.core.history import StageRecord
from components.report.config import ReportConfig
from components.report.stage import run as report

TEXT = "f" * 64
DENSE, INT8, FP8 = 20.0, 41.25, 42.5


def steps(format="int8", perplexity=INT8, dense=DENSE, sparsity=0.7, text=TEXT, dense_text=TEXT, passed=True):
    """The records that a quantized model's history is made of."""
    pruned = {"perplexity_before": dense, "perplexity": 90.0, "perplexity_text": dense_text, "sparsity": sparsity}
    measured = {"perplexity": perplexity, "perplexity_text": text, "sparsity": sparsity, "bytes": 300_000}
    check = {"passed": passed, "violations": 0, "max_abs": 0.0}
    return [
        StageRecord("prune", {"sparsity": 0.7}, {name: value for name, value in pruned.items() if value is not None}, check),
        StageRecord(
            "quantize", {"format": format}, {name: value for name, value in measured.items() if value is not None}, check
        ),
    ]


def save_model(folder: Path, weights: bytes = b"int8", **changes) -> str:
    """Save a checkpoint; publish reads its history and copies the rest unchanged."""
    folder.mkdir(parents=True)
    records = steps(**changes)
    history = {"format": 1, "source": {"model_id": "some/model", "revision": "abc"}}
    # not with write_json, since a file from elsewhere may contain NaN
    (folder / "compression.json").write_text(json.dumps(history | {"steps": [record.summary() for record in records]}))
    (folder / "quantize_stats.json").write_text(json.dumps(asdict(records[-1])))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights * 100_000)
    return str(folder)


@pytest.fixture(scope="session")
def summary_dir(tmp_path_factory) -> str:
    """A report; tests must not change it."""
    folder = tmp_path_factory.mktemp("publish")
    report(ReportConfig(models=[save_model(folder / "model")], output_dir=str(folder / "summary")))
    return str(folder / "summary")


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Two formats of a model."""
    return [
        save_model(tmp_path / "a" / "quantized_model"),
        save_model(tmp_path / "b" / "quantized_model", b"fp8.", format="fp8", perplexity=FP8),
    ]


@pytest.fixture
def settings(models, summary_dir, tmp_path) -> dict[str, object]:
    """Settings that publish both, with a report, into `tmp_path / "models"`."""
    return {"models": models, "summary_dir": summary_dir, "publish_to": str(tmp_path / "models")}
