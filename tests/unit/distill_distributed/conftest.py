"""What the tests of the launcher and of its watcher share: an API server on loopback, time and settings."""

import dataclasses
import json
import re

import pytest
from kubernetes.config import kube_config

from components.core import storage
from components.core.history import StageRecord
from components.core.mask.file import MASK_FILE, find_mask, fingerprint_of_file
from components.distill_distributed import cluster, logs, watch
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.config import DistillDistributedConfig
from components.distill_distributed.lifecycle import WORKFLOW
from components.distill_distributed.watch import Watcher
from tests.conftest import save_pruned
from tests.unit.distill_distributed.fake_api import NAMESPACE, kubeconfig, serving

MASTER, WORKER = "distill-1-master-0", "distill-1-worker-0"
JOBS = "/pytorchjobs/"


class Clock:
    """A clock that advances only during sleep."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1.75e9 + self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    """Teacher, student and mask; tests must not change them."""
    folder = tmp_path_factory.mktemp("launcher")
    save_pruned(folder, corpus)
    return folder


@pytest.fixture
def api(monkeypatch, tmp_path):
    """A fake API server that the kubeconfig points to; this process is not in a pod."""
    monkeypatch.setattr(cluster, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(cluster, "NAMESPACE_FILE", tmp_path / "no-namespace")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with serving() as server:
        (tmp_path / "kubeconfig").write_text(kubeconfig(server))
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The launcher's clock, so that polling takes no real time."""
    clock = Clock()
    for module in (cluster, logs, watch):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def in_pod(monkeypatch, tmp_path, api):
    """This process is in the pod launcher-1 of run 3f0c, whose Workflow is compress-1; there is also a launcher-2."""
    (tmp_path / "namespace").write_text(NAMESPACE)
    monkeypatch.setattr(cluster, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KFP_POD_NAME", "launcher-1")
    api.add_workflow("compress-1")
    owner = WORKFLOW | {"name": "compress-1", "uid": "uid-compress-1", "controller": True, "blockOwnerDeletion": True}
    for name in ("launcher-1", "launcher-2"):
        metadata = {"name": name, "uid": f"uid-{name}", "labels": {"pipeline/runid": "3f0c"}, "ownerReferences": [owner]}
        api.objects["v1/pods", NAMESPACE, name] = {"metadata": metadata, "spec": {"containers": [{"name": "main"}]}}


@pytest.fixture
def settings(models, corpus, tmp_path):
    """Settings of a job with two nodes that exchange models through a folder."""
    return DistillDistributedConfig(
        teacher_model=str(models / "dense"),
        student_model=str(models / "pruned"),
        mask_file=str(models / "pruned"),
        train_data=str(corpus),
        output_dir=str(tmp_path / "out"),
        handover=str(tmp_path / "handover"),
        image="sparse-distill/cpu:0.1.0",
        skip_ppl_eval=True,
    )


def place_of(api, kind="pytorchjob"):
    """The place for inputs and result, from the job's command."""
    return re.search(r'"--result", "([^"]+)/result"', json.dumps(api.job(kind)))[1]


def hand_over_result(api, settings, tmp_path, kind="pytorchjob", place="", **changes):
    """Do what the first node does at its end: write a record and a model and, if it is told where, its mask."""
    mask = fingerprint_of_file(find_mask(settings.mask_file))
    record = StageRecord(
        stage="distill",
        parameters={"fail_on_sparse_violation": True},
        measured={"loss": 1.5},
        sparse_integrity_check={"passed": True},
        details={"inputs": {"mask": mask}},
    )
    folder = tmp_path / "on-the-node"
    folder.mkdir()
    dataclasses.replace(record, **changes).save(folder / "distill_stats.json")
    (folder / "model.safetensors").write_bytes(b"weights")
    if told := re.search(r'"--result_mask", "([^"]+)"', json.dumps(api.job(kind))):
        (tmp_path / "mask-on-the-node").mkdir()
        (tmp_path / "mask-on-the-node" / MASK_FILE).write_bytes(b"new mask")
        storage.upload(tmp_path / "mask-on-the-node", told[1])
    storage.upload(folder, place or f"{place_of(api, kind)}/result")


def success(api, settings, tmp_path, kind="pytorchjob", **changes):
    """A job whose inputs are in place, and which runs and succeeds."""
    api.state("Created", kind=kind)
    for name in ("teacher_model", "student_model", "train_data"):  # the mask is in the student's folder
        assert storage.is_complete(f"{place_of(api, kind)}/inputs/{name}")
    yield
    api.run(MASTER, WORKER, kind=kind)
    api.state("Created", "Running", kind=kind)
    api.say(MASTER, "[PPL] finetune_start=30.0000")
    yield
    api.say(MASTER, "[PPL] epoch=1 eval_ppl=20.0000")
    hand_over_result(api, settings, tmp_path, kind, **changes)
    api.run(MASTER, WORKER, phase="Succeeded", kind=kind)
    api.state("Created", "Succeeded" if kind == "pytorchjob" else "Complete", kind=kind)


def follow(api, story, deadline=3600, kind="pytorchjob", place="/nowhere", **metadata):
    """Watch a job with two nodes and this story."""
    api.add_job(kind=kind, **metadata)
    api.story = story
    Watcher(Cluster.connect(), kind, "distill-1", 2, deadline, str(place)).follow()


def ending(api):
    """The job succeeds."""
    api.state("Succeeded")
    yield


def shown(capsys, pod=MASTER):
    """The lines of a pod's log that were printed."""
    return re.findall(rf"^  {pod}\| (.*)$", capsys.readouterr().out, re.MULTILINE)


def asked(api, method, pattern):
    """The requests whose method and path match."""
    return [request for request in api.asked if re.match(method, request) and re.search(pattern, request)]
