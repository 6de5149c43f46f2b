"""The KFP component: every setting reaches the stage, and the place is returned."""

from pathlib import Path

import pytest
from kfp.dsl import Artifact, Metrics, Model

from components.publish.component import publish
from tests.unit.publish.conftest import DENSE, FP8


def called(settings, tmp_path, **changes):
    metrics = Metrics(uri=str(tmp_path / "metrics"))
    parameters = {"version": "v1", "max_ppl_ratio": 0.0, "min_sparsity": 0.0, "registry": "", "registry_model": ""}
    place = publish.python_func(
        models=[Model(uri=folder) for folder in settings["models"]],
        report_files=Artifact(uri=settings["summary_dir"]),
        metrics=metrics,
        publish_to=settings["publish_to"],
        **parameters | changes,
    )
    return place, metrics.metadata


def test_it_publishes_logs_numbers_and_returns_the_place(settings, tmp_path):
    place, metrics = called(settings, tmp_path, max_ppl_ratio=3.0, min_sparsity=0.5)
    assert place == str(tmp_path / "models" / "v1")
    assert Path(place, "int8", "model.safetensors").is_file()
    assert metrics["ppl_ratio_fp8"] == FP8 / DENSE


@pytest.mark.parametrize("limit", [{"max_ppl_ratio": 1.0}, {"min_sparsity": 0.9}])
def test_a_failed_gate_fails_the_run(settings, tmp_path, limit):
    with pytest.raises(ValueError, match="the gate failed"):
        called(settings, tmp_path, **limit)
    assert not (tmp_path / "models").exists()


def test_a_failed_registration_fails_the_run(settings, tmp_path):
    with pytest.raises(OSError, match="the registry http://127.0.0.1:9 does not answer"):
        called(settings, tmp_path, registry="http://127.0.0.1:9", registry_model="small")
