"""Nodes read and write the pipeline's artifacts at their own places; nothing passes through the launcher."""

import dataclasses
import json
import shutil

import pytest

from components.core import storage
from components.core.mask.file import MASK_FILE
from components.core.storage import run_place
from components.core.storage.session import INFO, STORE, session_of
from components.distill.checkpoints import checkpoint_dir_here, checkpoints_of_run
from components.distill_distributed import stage, sweep
from components.distill_distributed.job import RENDERERS, RUN_LABEL, SESSION, stored_session
from components.distill_distributed.sweep import SweepConfig
from components.distill_distributed.watch import JobError
from tests.unit.distill_distributed.conftest import MASTER, WORKER, hand_over_result

TOLD = {
    "Provider": "minio",
    "Params": {
        "endpoint": "seaweedfs.kubeflow:9000", "region": "minio", "disableSSL": "true", "fromEnv": "false",
        "secretName": "mlpipeline-minio-artifact", "accessKeyKey": "accesskey", "secretKeyKey": "secretkey",
    },
}  # fmt: skip
RUN = "minio://mlpipeline/v2/artifacts/compress-distributed/3f0c"


@pytest.fixture
def direct(settings, models, corpus, tmp_path):
    """Settings of a job whose nodes use the artifacts, which are folders as KFP would store them."""
    run = tmp_path / "artifacts" / "3f0c"
    folders = {"teacher_model": models / "dense", "student_model": models / "pruned", "mask_file": models / "pruned"}
    for parameter, folder in {**folders, "train_data": corpus}.items():
        shutil.copytree(folder, run / "task" / "unique" / parameter)
    places = {name: f"{run}/task/unique/{name}" for name in (*folders, "train_data", "output_dir")}
    return dataclasses.replace(settings, handover="", artifacts=json.dumps(places))


def success(api, settings, tmp_path, **changes):
    api.state("Created")
    yield
    api.run(MASTER, WORKER)
    api.state("Created", "Running")
    yield
    hand_over_result(api, settings, tmp_path, place=settings.artifact_places()["output_dir"], **changes)
    api.run(MASTER, WORKER, phase="Succeeded")
    api.state("Created", "Succeeded")


def flag_of(api, name):
    """The value of a flag of the nodes' command."""
    (container,) = api.job()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    command = container["command"]
    return command[command.index(name) + 1]


def test_nodes_are_given_the_artifacts_own_places(api, direct, tmp_path):
    before = sorted(path for path in (tmp_path / "artifacts").rglob("*") if path.is_file())
    api.story = success(api, direct, tmp_path)
    record = stage.run(direct)
    assert record.measured == {"loss": 1.5}
    places = direct.artifact_places()
    assert json.loads(flag_of(api, "--inputs")) == {name: places[name] for name in direct.inputs()}
    assert flag_of(api, "--result") == places["output_dir"]
    assert not (tmp_path / "out").exists()  # KFP then takes what lies at the artifact's place
    after = sorted(path for path in (tmp_path / "artifacts").rglob("*") if path.is_file())
    assert {path.parent.name for path in set(after) - set(before)} == {"output_dir"}
    assert storage.is_complete(places["output_dir"])


def test_the_mask_is_written_to_its_own_place_and_a_job_without_it_has_failed(api, direct, tmp_path):
    file = f"{tmp_path}/masks/{MASK_FILE}"
    with pytest.raises(ValueError, match="artifacts must have a place for output_mask_file"):
        dataclasses.replace(direct, output_mask_file=file)
    places = direct.artifact_places() | {"output_mask_file": f"{tmp_path}/artifacts/3f0c/task/unique/distilled_mask"}
    direct = dataclasses.replace(direct, output_mask_file=file, artifacts=json.dumps(places))
    api.story = success(api, direct, tmp_path)
    stage.run(direct)
    assert flag_of(api, "--result_mask") == places["output_mask_file"]
    assert storage.read_bytes(f"{places['output_mask_file']}/{MASK_FILE}") == b"new mask"
    assert not (tmp_path / "masks").exists()
    assert not [flag for flag in json.loads(flag_of(api, "--flags")) if "mask_file" in flag]
    storage.remove(places["output_mask_file"])
    with pytest.raises(JobError, match="says that it succeeded, but .*/distilled_mask holds no complete result"):
        stage.run(direct)


def test_checkpoints_lie_beside_the_artifacts_until_the_job_has_succeeded(api, direct, tmp_path):
    def go():
        story = success(api, direct, tmp_path)
        next(story)
        (flag,) = [flag for flag in json.loads(flag_of(api, "--flags")) if flag.startswith("--checkpoint_dir=")]
        place = flag.partition("=")[2]
        assert place.startswith(f"{tmp_path}/artifacts/3f0c/checkpoints/distill-")
        storage.write_bytes(f"{place}/step-1/manifest.json", b"{}")
        yield
        yield from story

    api.story = go()
    stage.run(direct)
    assert not [path for path in (tmp_path / "artifacts/3f0c/checkpoints").rglob("*") if path.is_file()]


@pytest.mark.parametrize(("checkpoints", "wanted"), [("none", ""), ("gs://other/place", "gs://other/place/none/")])
def test_checkpoints_may_be_elsewhere_or_nowhere(direct, checkpoints, wanted):
    exchange = stage.make_exchange(dataclasses.replace(direct, checkpoints=checkpoints), "none", "distill-1")
    assert exchange.checkpoints == (f"{wanted}distill-1" if wanted else "")


def damaged(place):
    (place / "model.safetensors").write_bytes(b"w")


def without_proof(place):
    (place / "complete.json").unlink()


@pytest.mark.parametrize("damage", [damaged, without_proof])
def test_a_result_that_is_not_whole_has_failed(api, direct, tmp_path, damage):
    def go():
        yield from success(api, direct, tmp_path)
        damage(tmp_path / "artifacts/3f0c/task/unique/output_dir")

    api.story = go()
    with pytest.raises(JobError, match="says that it succeeded, but .*/output_dir holds no complete result"):
        stage.run(direct)


def test_nodes_reach_the_store_as_kfp_tells_and_see_the_secret_by_reference(direct, monkeypatch):
    session = session_of(f"{RUN}/prune/1/pruned_model", {INFO: json.dumps(TOLD)})
    monkeypatch.setenv(STORE, json.dumps(dataclasses.asdict(session)))
    places = dict.fromkeys(direct.artifact_places(), f"{RUN}/distill/1/distilled_model")
    config = dataclasses.replace(direct, artifacts=json.dumps(places))
    exchange = stage.make_exchange(config, "3f0c", "distill-1")
    for kind, render in RENDERERS.items():
        job = render(stage.make_spec(dataclasses.replace(config, kind=kind), "team", "3f0c", "distill-1", exchange, None))
        text = json.dumps(job)
        assert '\\"endpoint\\": \\"http://seaweedfs.kubeflow:9000' in text
        keys = {"ARTIFACT_STORE_ACCESS_KEY": "accesskey", "ARTIFACT_STORE_SECRET_KEY": "secretkey"}
        for variable, key in keys.items():
            reference = {"secretKeyRef": {"name": "mlpipeline-minio-artifact", "key": key}}
            assert json.dumps({"name": variable, "valueFrom": reference}) in text
        assert stored_session(job) == session  # by which the sweep reaches it too


def test_the_sweep_removes_the_checkpoints_of_its_run_where_its_jobs_kept_them(api, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(storage, "use_session", lambda session, *_: told.append(session))
    session = session_of(f"{RUN}/prune/1/pruned_model", {INFO: json.dumps(TOLD)})
    annotations = {SESSION: json.dumps(dataclasses.asdict(session))}
    api.add_job("distill-mine", labels={RUN_LABEL: "mine"}, annotations=annotations)
    for run in ("mine", "theirs"):
        storage.write_bytes(f"{tmp_path}/{run}/checkpoints/key/object", b"data")
    sweep.run(SweepConfig(run_id="mine", checkpoints=f"{tmp_path}/mine/checkpoints"))
    assert told == [session]
    assert not (tmp_path / "mine/checkpoints").exists()
    assert (tmp_path / "theirs/checkpoints").exists()


def test_the_place_of_a_runs_checkpoints(monkeypatch):
    monkeypatch.delenv("DISTILL_CHECKPOINT_DIR", raising=False)
    uri = f"{RUN}/distill/3b5c/distilled_model"
    assert run_place(uri) == RUN
    assert checkpoints_of_run("auto", uri) == f"{RUN}/checkpoints"
    assert checkpoints_of_run("gs://bucket/here", uri) == "gs://bucket/here/3f0c"
    assert checkpoints_of_run("none", uri) == ""
    assert checkpoint_dir_here("auto", uri, "deepspeed", keep_best=True) == ""
    assert checkpoint_dir_here("auto", "/runs/distill/1/distilled_model", "none", keep_best=False) == ""  # kfp.local
    monkeypatch.setenv("DISTILL_CHECKPOINT_DIR", "/runs/checkpoints")
    assert checkpoint_dir_here("auto", "/runs/distill/1/distilled_model", "none", keep_best=False) == "/runs/checkpoints"


def test_what_cannot_be_removed_does_not_fail_a_job_that_has_succeeded(api, direct, tmp_path, monkeypatch, capsys):
    def refuse(place):
        raise OSError(f"{place}: 403")

    monkeypatch.setattr("components.core.storage.place.remove", refuse)
    api.story = success(api, direct, tmp_path)
    assert stage.run(direct).measured == {"loss": 1.5}
    assert "could not be removed, what is left there must be removed by hand" in capsys.readouterr().out


def test_the_sweep_deletes_every_job_before_it_looks_at_the_store(api, tmp_path, capsys):
    for name in ("distill-1", "distill-2"):
        api.add_job(name, labels={RUN_LABEL: "mine"}, annotations={SESSION: "damaged"})
    sweep.run(SweepConfig(run_id="mine", checkpoints=f"{tmp_path}/mine/checkpoints"))
    assert not api.jobs()
    assert "the store of the artifacts cannot be reached as KFP says" in capsys.readouterr().out


def test_the_sweep_waits_for_pods_of_a_job_that_is_gone(api, tmp_path, clock):
    """The launcher deletes the job when the run is terminated; its pods may still write a checkpoint."""
    api.add_job("distill-1")
    api.run(MASTER)
    (pod,) = [thing for (resource, *_), thing in api.objects.items() if resource.plural == "pods"]
    pod.patch({"metadata": {"labels": {RUN_LABEL: "mine"}}})
    storage.write_bytes(f"{tmp_path}/mine/checkpoints/key/object", b"data")
    with pytest.raises(ValueError, match=f"pod {MASTER} is still there after 300 s"):
        sweep.run(SweepConfig(run_id="mine", checkpoints=f"{tmp_path}/mine/checkpoints"))
    assert (tmp_path / "mine/checkpoints").exists()
