"""What the tests of launchers share: models, their archive in the cluster, a run, and this machine's address."""

import base64
import json
import socket
import tarfile
import uuid
from pathlib import Path

import pytest

from components.distill.config import DistillConfig
from components.distill.stage import run as distill
from components.tokenize.config import TokenizeConfig
from components.tokenize.stage import run as tokenize
from tests.cluster.launcher import STEPS, Run, settings
from tests.conftest import save_pruned


@pytest.fixture(scope="session")
def models(tmp_path_factory, corpus) -> Path:
    """A folder with a tiny dense and a tiny pruned model, tokens, and a single-process run to compare with."""
    folder = tmp_path_factory.mktemp("cluster")
    save_pruned(folder, corpus)
    data = {"train_data": str(corpus), "eval_data": str(corpus), "seq_len": 32, "eval_seq_len": 32}
    tokenize(TokenizeConfig(model_dir=str(folder / "dense"), output_dir=str(folder / "tokens"), nsamples=4, **data))
    distill(DistillConfig(**settings(folder), batch_size=4, output_dir=str(folder / "one")))
    return folder


@pytest.fixture(scope="session")
def inputs(models, space) -> str:
    """A ConfigMap with the models in an archive, for the launchers' pods."""
    archive = models / "inputs.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("dense", "pruned", "tokens"):
            tar.add(models / name, name)
    data = {archive.name: base64.b64encode(archive.read_bytes()).decode()}
    space.core.create_namespaced_config_map(space.namespace, {"metadata": {"name": "inputs"}, "binaryData": data})
    return "inputs"


@pytest.fixture(scope="session")
def address(space) -> str:
    """The address at which pods reach this machine, which must be the cluster's node."""
    (node, *_) = space.core.list_node().items
    found = next(entry.address for entry in node.status.addresses if entry.type == "InternalIP")
    with socket.socket() as probe:
        try:
            probe.bind((found, 0))
        except OSError:
            pytest.skip(f"this machine is not the cluster's node, which is {found}")
    return found


@pytest.fixture
def pipeline_run(space) -> Run:
    """A run; its pods and jobs are removed with it at the end."""
    run = Run(space, f"run-{uuid.uuid4().hex[:8]}")
    yield run
    run.delete()


def check_like_one(models: Path, stats: dict) -> None:
    """Check for the same loss curve as with one process, and exact zeros."""
    wanted = json.loads((models / "one" / "distill_stats.json").read_text())
    curves = [[step["loss"] for step in found["details"]["steps"]] for found in (wanted, stats)]
    assert len(curves[0]) == STEPS
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert stats["sparse_integrity_check"]["violations"] == 0
