"""The launcher against an API server on loopback: successful runs, and faults that a real server does not produce on demand."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from components.core import storage
from components.distill_distributed import cluster, stage, sweep
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.job import MANAGED_BY, RUN_LABEL
from components.distill_distributed.lifecycle import WORKFLOW
from components.distill_distributed.sweep import SweepConfig
from components.distill_distributed.watch import RUNNING_SINCE, JobError
from tests.unit.distill_distributed.conftest import (
    JOBS,
    MASTER,
    WORKER,
    asked,
    place_of,
    success,
)
from tests.unit.distill_distributed.fake_api import NAMESPACE, RESOURCES, WORKFLOWS

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("kind", RESOURCES)
def test_inputs_go_out_the_job_runs_and_the_result_comes_back(api, settings, tmp_path, capsys, kind):
    settings = dataclasses.replace(settings, kind=kind)
    api.story = success(api, settings, tmp_path, kind)
    record = stage.run(settings)
    assert record.measured == {"loss": 1.5}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"
    manifest = yaml.safe_load((tmp_path / "out.job.yaml").read_text())
    submitted = api.job(kind)
    assert set(submitted["metadata"].pop("annotations")) == {RUNNING_SINCE}
    assert {name: submitted[name] for name in manifest} == manifest
    assert not Path(place_of(api, kind)).exists()  # it is no longer needed
    printed = capsys.readouterr().out
    assert "running on 2 nodes" in printed
    assert re.findall(r"\[PPL\].*", printed) == ["[PPL] finetune_start=30.0000", "[PPL] epoch=1 eval_ppl=20.0000"]


def test_the_mask_of_the_result_comes_back_too(api, settings, tmp_path):
    settings = dataclasses.replace(settings, output_mask_file=str(tmp_path / "masks" / "new.safetensors"))
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    assert (tmp_path / "masks" / "new.safetensors").read_bytes() == b"new mask"
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["new.safetensors"]
    assert not Path(place_of(api)).exists()


def test_the_manifest_is_written_before_the_job_is_submitted(api, settings, tmp_path):
    api.fail("POST", "pytorchjobs", 403)
    with pytest.raises(ValueError, match="403"):
        stage.run(settings)
    assert yaml.safe_load((tmp_path / "out.job.yaml").read_text())["kind"] == "PyTorchJob"
    assert not api.jobs()


def lose_launcher(api, settings):
    """Run a launcher that fails right after it has created its job, and leaves the job behind."""
    api.fail("GET", JOBS, 403)
    with pytest.raises(ValueError, match="403"):
        stage.run(settings)


def test_the_next_try_adopts_the_job_of_a_lost_launcher(api, settings, tmp_path, capsys):
    lose_launcher(api, settings)
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    assert "of an earlier try is there: adopting it" in capsys.readouterr().out
    assert not asked(api, "DELETE", "pytorchjobs")
    assert (tmp_path / "out").is_dir()


def owners_of_two_tries(api, settings, tmp_path, monkeypatch):
    """The job's owners while the first launcher had it, after the second had it, and how often the job was changed."""
    lose_launcher(api, settings)
    first = api.job()["metadata"]["ownerReferences"]
    monkeypatch.setenv("KFP_POD_NAME", "launcher-2")
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    return first, api.job()["metadata"]["ownerReferences"], len(asked(api, "PATCH", JOBS))


def test_a_job_belongs_to_the_run_and_not_to_the_pod_of_its_launcher(api, settings, tmp_path, monkeypatch, in_pod):
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "compress-1", "uid": "uid-compress-1"}
    found = owners_of_two_tries(api, settings, tmp_path, monkeypatch)
    assert found == ([owner], [owner], 1)  # the change is when it began to run


def test_a_job_of_a_run_that_was_made_anew_belongs_to_its_new_workflow(api, settings, tmp_path, monkeypatch, in_pod):
    of_launcher_2 = api.objects["v1/pods", NAMESPACE, "launcher-2"]
    of_launcher_2.patch({"metadata": {"ownerReferences": [WORKFLOW | {"name": "compress-1", "uid": "new"}]}})
    first, second, _ = owners_of_two_tries(api, settings, tmp_path, monkeypatch)
    assert [first[0]["uid"], second[0]["uid"]] == ["uid-compress-1", "new"]


def test_outside_a_pipeline_a_job_belongs_to_the_pod_that_watches_it(api, settings, tmp_path, monkeypatch, in_pod):
    replicas = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "notebook", "uid": "0"}
    for pod in ("launcher-1", "launcher-2"):
        api.objects["v1/pods", NAMESPACE, pod].patch({"metadata": {"ownerReferences": [replicas]}})
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "launcher-1", "uid": "uid-launcher-1"}
    found = owners_of_two_tries(api, settings, tmp_path, monkeypatch)
    assert found == ([owner], [owner | {"name": "launcher-2", "uid": "uid-launcher-2"}], 2)


def test_a_job_that_succeeded_while_no_launcher_watched_is_collected(api, settings, tmp_path):
    lose_launcher(api, settings)
    for _ in success(api, settings, tmp_path):
        pass
    assert stage.run(settings).measured == {"loss": 1.5}


@pytest.mark.parametrize("state", ["failed", "being-deleted"])
def test_a_job_of_an_earlier_try_that_ends_is_replaced(api, settings, tmp_path, state):
    lose_launcher(api, settings)
    (earlier,) = api.jobs()
    api.objects[earlier].patch({"metadata": {"finalizers": ["operator"]}})
    if state == "failed":
        api.state("Failed")
    else:
        Cluster.connect().delete_job("pytorchjob", earlier[-1])

    def go():
        yield  # the launcher looks at the job that has taken the name
        yield  # deleting it takes a while
        yield
        del api.objects[earlier]
        yield
        yield from success(api, settings, tmp_path)

    api.story, api.asked = go(), []
    stage.run(settings)
    assert "finalizers" not in api.job()["metadata"]
    assert [request.split()[0] for request in asked(api, "(POST|DELETE)", "pytorchjobs")] == ["POST", "DELETE", "POST"]


@pytest.mark.parametrize("labels", [{}, {MANAGED_BY: "sparse-distill", RUN_LABEL: "of-others"}], ids=["none", "other-run"])
def test_a_job_of_somebody_else_is_left_alone(api, settings, labels):
    name = stage.job_name("none", settings)
    api.add_job(name, labels=labels)
    before = json.dumps(api.job())
    with pytest.raises(JobError, match=f"job {name} exists and belongs to no try of this task"):
        stage.run(settings)
    assert json.dumps(api.job()) == before


@pytest.mark.parametrize("fault", ["reset", "half"])
def test_a_job_whose_creation_got_no_answer_is_adopted(api, settings, tmp_path, fault):
    api.fail("POST", "pytorchjobs", fault)
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    assert len(api.jobs()) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"details": {"inputs": {"mask": "another"}}}, "must train under the mask .*, its result says another"),
        ({"details": {}}, "its result says None"),
        ({"sparse_integrity_check": None}, "must end with a passed integrity check, its result says None"),
        ({"sparse_integrity_check": {"passed": False}}, "must end with a passed integrity check"),
    ],
    ids=["other-mask", "no-mask", "no-check", "failed-check"],
)
def test_a_job_that_succeeded_with_a_wrong_result_has_failed(api, settings, tmp_path, change, words):
    api.story = success(api, settings, tmp_path, **change)
    with pytest.raises(JobError, match=words):
        stage.run(settings)


@pytest.mark.parametrize("left", [[], ["model.safetensors", "distill_stats.json"]], ids=["nothing", "incomplete"])
def test_a_job_that_succeeded_without_a_result_has_failed(api, settings, tmp_path, left):
    def go():
        for _ in success(api, settings, tmp_path):
            yield
        result = f"{place_of(api)}/result"
        kept = {name: storage.read_bytes(f"{result}/{name}") for name in left}
        storage.remove(result)
        for name, data in kept.items():
            storage.write_bytes(f"{result}/{name}", data)

    api.story = go()
    with pytest.raises(JobError, match="says that it succeeded, but .*/result holds no complete result"):
        stage.run(settings)
    assert not (tmp_path / "out").exists()


def test_sigterm_deletes_the_job(api, settings, tmp_path):
    looked_at = threading.Event()

    def go():
        yield
        looked_at.set()
        yield

    api.story = go()
    flags = [f"--{name}={getattr(settings, name)}" for name in ("teacher_model", "student_model", "mask_file", "train_data")]
    flags += [f"--{name}={getattr(settings, name)}" for name in ("output_dir", "handover", "image", "skip_ppl_eval")]
    process = subprocess.Popen(
        [sys.executable, "-m", "components.distill_distributed", *flags],
        env=os.environ | {"KUBECONFIG": str(tmp_path / "kubeconfig")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert looked_at.wait(25)
    (name,) = [thing["metadata"]["name"] for thing in api.jobs().values()]
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"deleting job {name}: asked to end" in printed
    assert not api.jobs()


def stop_launcher(api, settings):
    """Run a launcher that gets SIGTERM while its job runs."""

    def go():
        yield
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    api.story = go()
    with pytest.raises(SystemExit) as end:
        stage.run(settings)
    assert end.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "workflow",
    [
        {"spec": {"activeDeadlineSeconds": 0}},
        {"spec": {"activeDeadlineSeconds": 60}},
        {"spec": {"shutdown": "Terminate"}},
        {"spec": {"shutdown": "Stop"}, "status": {"phase": "Running"}},
        {"metadata": {"deletionTimestamp": "2026-01-02T00:00:00Z", "finalizers": ["artifact-gc"]}},
        {"metadata": {"uid": "another"}},
        None,
    ],
    ids=["KFP", "too-long", "argo-terminate", "argo-stop", "being-deleted", "made-anew", "gone"],
)
def test_when_the_run_ends_so_does_its_job(api, settings, in_pod, workflow, capsys):
    if workflow is None:
        del api.objects[WORKFLOWS, NAMESPACE, "compress-1"]
    else:
        api.add_workflow("compress-1", **workflow)
    stop_launcher(api, settings)
    assert "asked to end" in capsys.readouterr().out
    assert not api.jobs()


@pytest.mark.parametrize(
    "workflow",
    [
        {},
        {"spec": {"activeDeadlineSeconds": None, "shutdown": ""}, "status": {"phase": "Running"}},
        {"spec": {"activeDeadlineSeconds": 10**10}},
        {"spec": {"activeDeadlineSeconds": 10**6}, "status": {"startedAt": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}},
    ],
    ids=["empty", "no-limit", "later", "started-later"],
)
def test_when_only_the_launcher_ends_its_job_runs_on(api, settings, tmp_path, in_pod, workflow, capsys):
    api.add_workflow("compress-1", created="2020-01-01T00:00:00Z", **workflow)
    stop_launcher(api, settings)
    (name,) = [thing["metadata"]["name"] for thing in api.jobs().values()]
    assert f"job {name} runs on: the next try of this run adopts it" in capsys.readouterr().out
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    assert "adopting it" in capsys.readouterr().out
    assert len(asked(api, "POST", JOBS.rstrip("/"))) == 2  # the second was refused, since the job was there


@pytest.mark.parametrize("fault", [403, 500, "reset", 3.0])
def test_a_job_runs_on_if_it_cannot_be_known_whether_the_run_ends(api, settings, in_pod, monkeypatch, capsys, fault):
    monkeypatch.setattr(cluster, "HASTY_TIMEOUT", (1, 0.3))
    api.fail("GET", "workflows", fault, times=100)
    stop_launcher(api, settings)
    assert len(api.jobs()) == 1
    assert "its Workflow compress-1 cannot be read: Kubernetes " in capsys.readouterr().out
    assert len(asked(api, "GET", "workflows")) <= 1 + cluster.HASTY_TRIES


def test_outside_a_pipeline_the_job_ends_with_its_launcher(api, settings, in_pod):
    api.objects["v1/pods", NAMESPACE, "launcher-1"].patch({"metadata": {"ownerReferences": []}})
    stop_launcher(api, settings)
    assert not api.jobs()


def test_a_failed_job_is_left_for_people(api, settings):
    def go():
        api.state("Failed")
        yield

    api.story = go()
    with pytest.raises(JobError, match="failed"):
        stage.run(settings)
    assert len(api.jobs()) == 1


@pytest.mark.parametrize("trainer", [True, False], ids=["both-kinds", "no-trainjob-kind"])
def test_the_sweep_deletes_only_jobs_and_handover_of_its_run(api, tmp_path, trainer):
    kinds = list(RESOURCES) if trainer else ["pytorchjob"]
    if not trainer:
        del api.resources[RESOURCES["trainjob"]]
    for kind in kinds:
        for run in ("mine", "theirs"):
            api.add_job(f"distill-{run}", kind, labels={RUN_LABEL: run})
    for run in ("mine", "theirs"):
        storage.write_bytes(f"{tmp_path}/handover/{run}/distill-{run}/object", b"data")
    for _ in range(2):  # the second finds nothing left to remove
        sweep.run(SweepConfig(run_id="mine", handover=f"{tmp_path}/handover"))
        assert [name for kind in kinds for (*_, name) in api.jobs(kind)] == ["distill-theirs"] * len(kinds)
        assert [folder.name for folder in (tmp_path / "handover").iterdir()] == ["theirs"]


def test_other_settings_do_not_find_an_earlier_result(api, settings, tmp_path):
    names = {stage.job_name("none", changed) for changed in (settings, dataclasses.replace(settings, epochs=3))}
    assert len(names) == 2
    assert stage.job_name("none", dataclasses.replace(settings, retries=7, queue="gpus")) in names  # not part of the training


def test_other_inputs_do_not_find_an_earlier_result(settings, tmp_path):
    shutil.copytree(settings.teacher_model, tmp_path / "changed")
    changed = dataclasses.replace(settings, teacher_model=str(tmp_path / "changed"))
    assert stage.job_name("none", changed) == stage.job_name("none", settings)  # another place, the same model
    (tmp_path / "changed" / "config.json").write_text("{}")
    assert stage.job_name("none", changed) != stage.job_name("none", settings)


def test_a_job_that_is_given_up_holds_no_gpus(api, settings, tmp_path, clock):
    def go():
        api.run(MASTER, WORKER)
        api.state("Running")
        yield
        clock.now += 10**6
        yield

    api.story = go()
    with pytest.raises(JobError, match="deadline"):
        stage.run(settings)
    assert not api.jobs()


def test_a_pipelines_next_try_does_not_run_a_failed_job_again(api, settings, in_pod):
    lose_launcher(api, settings)
    api.state("Failed")
    api.asked = []
    with pytest.raises(JobError, match=r"job distill-\w+ failed"):
        stage.run(settings)
    assert asked(api, "DELETE", "pytorchjobs") == []


def test_a_pod_outside_a_pipeline_replaces_a_failed_job(api, settings, in_pod):
    api.objects["v1/pods", NAMESPACE, "launcher-1"].patch({"metadata": {"ownerReferences": []}})
    lose_launcher(api, settings)
    api.state("Failed")
    api.asked = []
    with pytest.raises(JobError, match="had no pods"):  # the new job, which no operator attends to
        stage.run(settings)
    assert [request.split()[0] for request in asked(api, "(POST|DELETE)", "pytorchjobs")][:3] == ["POST", "DELETE", "POST"]
