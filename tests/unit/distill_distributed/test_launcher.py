"""The launcher against an API server on loopback: what goes well, and what a real server does not offer on demand."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from kubernetes.config import kube_config

from components.core import storage
from components.core.mask_file import find_mask, fingerprint_of_file
from components.core.record import StageRecord
from components.distill_distributed import cluster, stage, sweep, watch
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.config import DistillDistributedConfig
from components.distill_distributed.job import MANAGED_BY, RUN_LABEL
from components.distill_distributed.sweep import SweepConfig
from components.distill_distributed.watch import JobError, Watcher
from tests.conftest import save_pruned
from tests.unit.distill_distributed.fake_api import NAMESPACE, RESOURCES, ended, kubeconfig, serving

pytestmark = pytest.mark.timeout(30)
MASTER, WORKER = "distill-1-master-0", "distill-1-worker-0"
JOBS = "/pytorchjobs/"


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture(scope="module")
def models(tmp_path_factory, corpus):
    """Teacher, student and mask; not to be changed."""
    folder = tmp_path_factory.mktemp("launcher")
    save_pruned(folder, corpus)
    return folder


@pytest.fixture
def api(monkeypatch, tmp_path):
    """A fake API server that the kubeconfig leads to; this process is in no pod."""
    monkeypatch.setattr(cluster, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(cluster, "NAMESPACE_FILE", tmp_path / "no-namespace")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with serving() as server:
        (tmp_path / "kubeconfig").write_text(kubeconfig(server))
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The launcher's time: polling costs none of ours."""
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(cluster, "time", clock)
    return clock


@pytest.fixture
def in_pod(monkeypatch, tmp_path, api):
    """This process is in the pod launcher-1 of run 3f0c; there is a launcher-2 too."""
    (tmp_path / "namespace").write_text(NAMESPACE)
    monkeypatch.setattr(cluster, "NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KFP_POD_NAME", "launcher-1")
    for name in ("launcher-1", "launcher-2"):
        api.objects["v1/pods", NAMESPACE, name] = {
            "metadata": {"name": name, "uid": f"uid-{name}", "labels": {"pipeline/runid": "3f0c"}},
            "spec": {"containers": [{"name": "main"}]},
        }


@pytest.fixture
def settings(models, corpus, tmp_path):
    """Settings of a job of two nodes, which exchange models through a folder."""
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
    """Where the job's command says that inputs and result are."""
    return re.search(r'"--place", "([^"]+)"', json.dumps(api.job(kind)))[1]


def hand_over_result(api, settings, tmp_path, kind="pytorchjob", **changes):
    """What the first node does at its end: it writes a record, and a model."""
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
    storage.upload(folder, f"{place_of(api, kind)}/result")


def success(api, settings, tmp_path, kind="pytorchjob", **changes):
    """A job whose inputs are there, that runs and succeeds."""
    api.state("Created", kind=kind)
    for name in ("teacher_model", "student_model", "train_data"):  # the mask lies with the student
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


def follow(api, story, deadline=3600, kind="pytorchjob"):
    """Watch a job of two nodes with this story."""
    api.add_job(kind=kind)
    api.story = story
    Watcher(Cluster.connect(), kind, "distill-1", 2, deadline).follow()


def ending(api):
    """The job succeeds."""
    api.state("Succeeded")
    yield


def shown(capsys, pod=MASTER):
    """What was printed of a pod's log."""
    return re.findall(rf"^  {pod}\| (.*)$", capsys.readouterr().out, re.MULTILINE)


def asked(api, method, pattern):
    """The requests of a kind."""
    return [request for request in api.asked if re.match(method, request) and re.search(pattern, request)]


@pytest.mark.parametrize("kind", RESOURCES)
def test_inputs_go_out_the_job_runs_and_the_result_comes_back(api, settings, tmp_path, capsys, kind):
    settings = dataclasses.replace(settings, kind=kind)
    api.story = success(api, settings, tmp_path, kind)
    record = stage.run(settings)
    assert record.measured == {"loss": 1.5}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"weights"
    manifest = yaml.safe_load((tmp_path / "out.job.yaml").read_text())
    assert {name: api.job(kind)[name] for name in manifest} == manifest
    assert not Path(place_of(api, kind)).exists()  # nobody needs it any more
    printed = capsys.readouterr().out
    assert "running on 2 nodes" in printed
    assert re.findall(r"\[PPL\].*", printed) == ["[PPL] finetune_start=30.0000", "[PPL] epoch=1 eval_ppl=20.0000"]


def test_the_manifest_is_written_before_the_job_is_submitted(api, settings, tmp_path):
    api.fail("POST", "pytorchjobs", 403)
    with pytest.raises(ValueError, match="403"):
        stage.run(settings)
    assert yaml.safe_load((tmp_path / "out.job.yaml").read_text())["kind"] == "PyTorchJob"
    assert not api.jobs()


def lose_launcher(api, settings):
    """Run a launcher that ends, for all that its job knows, when it has created the job."""
    api.fail("GET", JOBS, 403)
    with pytest.raises(ValueError, match="403"):
        stage.run(settings)


def test_the_next_try_adopts_the_job_of_a_lost_launcher(api, settings, tmp_path, capsys):
    lose_launcher(api, settings)
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    assert "of an earlier try is there: adopting it" in capsys.readouterr().out
    assert not asked(api, "(DELETE|PATCH)", "pytorchjobs")
    assert (tmp_path / "out").is_dir()


def test_the_pod_of_the_next_try_becomes_the_owner(api, settings, tmp_path, monkeypatch, in_pod):
    lose_launcher(api, settings)
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "launcher-1", "uid": "uid-launcher-1"}
    assert api.job()["metadata"]["ownerReferences"] == [owner]
    monkeypatch.setenv("KFP_POD_NAME", "launcher-2")
    api.story = success(api, settings, tmp_path)
    stage.run(settings)
    assert api.job()["metadata"]["ownerReferences"] == [owner | {"name": "launcher-2", "uid": "uid-launcher-2"}]


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
        yield  # the look at the job whose name is taken
        yield  # it goes slowly
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


def test_a_job_that_is_deleted_while_it_is_watched_is_an_error(api):
    def go():
        api.state("Running")
        yield
        del api.objects[RESOURCES["pytorchjob"], NAMESPACE, "distill-1"]
        yield

    with pytest.raises(JobError, match="job distill-1 was deleted while it was watched"):
        follow(api, go())


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 504, "reset", "half"])
def test_a_server_that_fails_for_a_while_is_asked_again(api, capsys, fault):
    def go():
        api.run(MASTER, WORKER)
        for number in range(5):
            api.say(MASTER, f"step {number}")
            yield
        api.pod(WORKER, restarts=1, last=ended(1, "Error"))
        api.say(WORKER, "RuntimeError: bad luck", previous=True)
        yield
        yield from ending(api)

    for path in (JOBS, "/pods$", f"{MASTER}/log", f"{WORKER}/log"):
        api.fail("GET", path, fault, times=3)
    follow(api, go())
    printed = capsys.readouterr().out
    assert re.findall(rf"{MASTER}\| (.*)", printed) == [f"step {number}" for number in range(5)]
    assert f"{WORKER}| RuntimeError: bad luck" in printed


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [("reset", OSError, "Kubernetes does not answer"), (500, ValueError, r"Kubernetes refused GET \S+: 500, not now")],
)
def test_a_server_that_fails_for_good_is_told_in_one_line(api, monkeypatch, fault, error, words):
    monkeypatch.setattr(cluster, "TRIES", 2)
    api.fail("GET", JOBS, fault, times=100)
    with pytest.raises(error, match=f"^{words}[^\n]*$"):
        follow(api, ending(api))
    assert len(asked(api, "GET", JOBS)) == 3


def test_a_slow_answer_is_awaited_and_one_that_does_not_come_is_asked_for_again(api, monkeypatch):
    monkeypatch.setattr(cluster, "TIMEOUT", (5, 0.3))
    api.fail("GET", JOBS, 0.1)
    follow(api, ending(api))
    assert len(asked(api, "GET", JOBS)) == 1
    api.fail("GET", JOBS, 0.6)
    Cluster.connect().read_job("pytorchjob", "distill-1")
    assert len(asked(api, "GET", JOBS)) == 3


def test_a_queued_job_is_not_taken_for_a_running_one(api, capsys, clock):
    def go():
        api.run(MASTER, WORKER)
        api.state("Suspended", message="waits for quota")
        yield
        yield
        clock.now += 100_000  # a queue may be long: the deadline does not run
        yield
        api.state("Running")
        yield
        clock.now += 3000
        api.state("Suspended", message="preempted")
        yield
        clock.now += 100_000
        yield
        api.state("Running")
        yield
        yield from ending(api)

    follow(api, go())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("job")]
    assert [re.sub(r", \S+ after it was submitted", "", line) for line in said] == [
        "job distill-1: queued, it is suspended (waits for quota)",
        "job distill-1: running on 2 nodes",
        "job distill-1: queued, it is suspended (preempted)",
        "job distill-1: running on 2 nodes",
    ]


def test_what_pods_wait_for_is_said_once_and_again_when_it_changes(api, capsys, clock):
    def go():
        for seconds in (0, 300, 300):
            clock.now += seconds
            api.pod(MASTER, "Pending", waiting={"reason": "ContainerCreating"})
            api.pod(WORKER, "Pending", unschedulable="0/3 nodes are available")
            yield
            yield
            api.pod(MASTER, "Pending", waiting={"reason": "ErrImagePull", "message": "no route"})
            api.pod(WORKER, "Pending", waiting={"reason": "ImagePullBackOff", "message": "Back-off"})
            yield
            yield
        api.pod(WORKER, waiting={"reason": "CrashLoopBackOff", "message": "back-off 10s"})
        api.pod(MASTER)
        yield
        yield
        yield from ending(api)

    follow(api, go())
    said = [line for line in capsys.readouterr().out.splitlines() if "waits" in line]
    pulls = [
        f"{WORKER} waits: Unschedulable: 0/3 nodes are available",
        f"{MASTER} waits: ErrImagePull: no route",
        f"{WORKER} waits: ImagePullBackOff: Back-off",
    ]
    assert said == [*pulls * 3, f"{WORKER} waits: CrashLoopBackOff: back-off 10s"]


def test_each_restart_is_told_with_exit_code_and_last_lines(api, capsys):
    def go():
        api.run(MASTER, WORKER)
        yield
        api.state("Restarting", message="a worker has failed")
        api.pod(WORKER, restarts=1, last=ended(137, "OOMKilled"))
        api.say(WORKER, *(f"line {number}" for number in range(100)), previous=True)
        yield
        yield
        api.pod(WORKER, restarts=2, last=ended(1, "Error", "second"))
        api.say(WORKER, "ValueError: again", previous=True)
        yield
        api.pod(WORKER, restarts=2, last=ended(1, "Error", "second"), terminated=ended(0, "Completed", "third"))
        yield
        yield from ending(api)

    follow(api, go())
    printed = capsys.readouterr().out
    assert re.findall(f"{WORKER} ended .*", printed) == [
        f"{WORKER} ended with exit code 137 (OOMKilled); its last lines:",
        f"{WORKER} ended with exit code 1 (Error); its last lines:",
    ]
    assert printed.count("job distill-1: restarting (a worker has failed)") == 1
    told = re.findall(rf"{WORKER}\| (.*)", printed)
    assert told[:40] == [f"line {number}" for number in range(60, 100)]
    assert told[-1] == "ValueError: again"


def test_lines_are_shown_once_each(api, capsys, clock):
    def go():
        api.run(MASTER, WORKER)
        api.state("Running")
        api.say(MASTER, "an hour ago", age=3600)
        yield
        for number in range(8):
            clock.now += 10 * (number % 3)
            api.say(MASTER, f"{number} first", f"{number} at the same time")
            yield
            yield
        api.run(MASTER, WORKER, phase="Succeeded")
        api.say(MASTER, "the last")
        yield from ending(api)

    follow(api, go())
    pairs = [line for number in range(8) for line in (f"{number} first", f"{number} at the same time")]
    assert shown(capsys) == ["an hour ago", *pairs, "the last"]
    requests = asked(api, "GET", f"{MASTER}/log")
    assert "sinceSeconds" not in requests[0]
    assert all(int(re.search(r"sinceSeconds=(\d+)", request)[1]) >= 30 for request in requests[1:])


def test_a_line_may_hold_anything(api, capsys):
    lines = [" 10%|█ | 1/9\r 20%|█ | 2/9", "form\x0cfeed", "", "  indented", "\u2028", "after"]

    def go():
        api.run(MASTER, WORKER)
        for line in lines:
            api.say(MASTER, line)
            yield
        yield from ending(api)

    follow(api, go())
    printed = capsys.readouterr().out.split("\n")
    assert [line.removeprefix(f"  {MASTER}| ") for line in printed if line.startswith(f"  {MASTER}| ")] == lines


def test_what_the_kubelet_says_in_place_of_a_log_hides_no_line(api, capsys):
    def go():
        api.run(MASTER, WORKER)
        api.say(MASTER, "before")
        yield
        api.instead_of_logs = "unable to retrieve container logs for containerd://0123"
        yield
        api.instead_of_logs = ""
        api.say(MASTER, "after")
        yield from ending(api)

    follow(api, go())
    assert shown(capsys) == ["before", "after"]


def test_another_launcher_shows_the_whole_log(api, capsys):
    def go():
        api.run(MASTER, WORKER)
        api.say(MASTER, "first")
        yield
        yield from ending(api)

    follow(api, go())
    assert shown(capsys) == ["first"]
    api.say(MASTER, "second")
    follow(api, go())
    assert shown(capsys) == ["first", "second", "first"]


def test_a_failure_is_told_with_all_that_is_known_of_it(api, capsys):
    def go():
        api.run(MASTER, WORKER)
        api.state("Running")
        yield
        api.pod(WORKER, "Failed", terminated=ended(1, "Error"))
        api.say(WORKER, "torch.OutOfMemoryError: CUDA out of memory")
        api.warn(WORKER, "BackOff", "Back-off restarting failed container")
        api.warn("distill-1", "PyTorchJobFailed", "it has failed")
        api.warn("another", "Unrelated", "nothing to see")
        yield
        del api.objects["v1/pods", NAMESPACE, WORKER]  # by the operator
        api.state("Failed", reason="BackoffLimitExceeded", message="restarted too often")
        yield

    with pytest.raises(JobError) as error:
        follow(api, go())
    assert str(error.value) == (
        f"job distill-1 failed: BackoffLimitExceeded: restarted too often; {WORKER} ended with exit code 1 (Error)"
    )
    printed = capsys.readouterr().out
    assert f"{WORKER}| torch.OutOfMemoryError: CUDA out of memory" in printed
    assert "event of distill-1: PyTorchJobFailed: it has failed" in printed
    assert "Unrelated" not in printed


def test_the_operators_deadline_is_an_error(api):
    def go():
        api.run(MASTER, WORKER)
        yield
        api.state("Failed", reason="DeadlineExceeded", message="job was active longer than specified deadline")
        yield

    with pytest.raises(JobError, match="DeadlineExceeded: job was active longer than specified deadline"):
        follow(api, go())


def test_a_deadline_that_no_operator_holds_is_held_by_the_launcher(api, clock):
    def go():
        api.run(MASTER, WORKER)
        api.state("Running")
        yield
        clock.now += 3600 + watch.GRACE_SECONDS - 60
        yield
        yield
        clock.now += 60
        yield

    with pytest.raises(JobError, match="still runs after its deadline of 3600 s"):
        follow(api, go())
    assert len(asked(api, "GET", JOBS)) == 4


def test_a_job_that_no_operator_touches_is_given_up(api, clock, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 30.0)
    with pytest.raises(JobError, match="had no pods for 600 s: is the operator for kind trainjob installed"):
        follow(api, iter(()), kind="trainjob")
    assert watch.NO_PODS_PATIENCE < clock.now <= watch.NO_PODS_PATIENCE + 30


def test_an_image_that_cannot_be_pulled_is_given_up(api, capsys, clock):
    def go():
        api.pod(MASTER)
        while True:
            clock.now += 60
            for reason in ("ErrImagePull", "ImagePullBackOff"):
                api.pod(WORKER, "Pending", waiting={"reason": reason, "message": "no such image"})
                yield

    with pytest.raises(JobError, match=r"a container could not be made for 600 s, \w+: no such image"):
        follow(api, go())
    assert watch.FAULT_PATIENCE < clock.now < watch.FAULT_PATIENCE + 200
    printed = capsys.readouterr().out
    assert "job distill-1: 1 of 2 nodes run" in printed
    assert "running on" not in printed


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


def test_a_failed_job_is_left_for_people(api, settings):
    def go():
        api.state("Failed")
        yield

    api.story = go()
    with pytest.raises(JobError, match="failed"):
        stage.run(settings)
    assert len(api.jobs()) == 1


@pytest.mark.parametrize("trainer", [True, False], ids=["both-kinds", "no-trainjob-kind"])
def test_the_sweep_deletes_jobs_and_handover_of_its_run_alone(api, tmp_path, trainer):
    kinds = list(RESOURCES) if trainer else ["pytorchjob"]
    if not trainer:
        del api.resources[RESOURCES["trainjob"]]
    for kind in kinds:
        for run in ("mine", "theirs"):
            api.add_job(f"distill-{run}", kind, labels={RUN_LABEL: run})
    for run in ("mine", "theirs"):
        storage.write_bytes(f"{tmp_path}/handover/{run}/distill-{run}/object", b"data")
    for _ in range(2):  # the second finds nothing more
        sweep.run(SweepConfig(run_id="mine", handover=f"{tmp_path}/handover"))
        assert [name for kind in kinds for (*_, name) in api.jobs(kind)] == ["distill-theirs"] * len(kinds)
        assert [folder.name for folder in (tmp_path / "handover").iterdir()] == ["theirs"]


def test_other_settings_do_not_find_an_earlier_result(api, settings, tmp_path):
    names = {stage.job_name("none", changed) for changed in (settings, dataclasses.replace(settings, epochs=3))}
    assert len(names) == 2
    assert stage.job_name("none", dataclasses.replace(settings, retries=7, queue="gpus")) in names  # not what is trained


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


def test_events_tell_why_nobody_makes_pods(api, capsys, clock, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 60.0)
    api.warn("distill-1", "FailedCreatePod", 'pods "distill-1-master-0" is forbidden: exceeded quota')

    def go():
        while True:
            api.state("Created")
            yield

    with pytest.raises(JobError, match="had no pods for 600 s"):
        follow(api, go())
    assert capsys.readouterr().out.count("exceeded quota") == 1
