"""Distillation on two nodes, from a launcher in its own pod with the rights that the manifests grant, as KFP starts one.

Its inputs and outputs are local to that pod; the nodes can reach only the handover, a shared volume or a bucket.
"""

import itertools
import json
import os
import re
import socket
import time
from random import Random

import pytest
import torch
from gcp_storage_emulator.server import create_server
from safetensors.torch import load_file

from components.core.storage import download
from components.images import LAUNCHER_IMAGE
from tests.cluster import trainjob
from tests.cluster.fixtures import check_like_one
from tests.cluster.launcher import PATIENCE, STEPS, Handover, Launcher, log_of, run_in
from tests.cluster.operator import wait_for
from tests.manifests.test_manifests import MANIFESTS, render

ENDS = ("killed", "preempted", "lost")


@pytest.fixture(scope="module")
def storage_class(request, space, tmp_path_factory) -> str:
    """A storage class with ReadWriteMany: the one that STORAGE_CLASS names, or one for a folder on this machine."""
    if name := os.environ.get("STORAGE_CLASS"):
        yield name
        return
    request.getfixturevalue("address")
    folder = tmp_path_factory.mktemp("handover")
    folder.chmod(0o777)  # the pods run as another user
    spec = {"accessModes": ["ReadWriteMany"], "capacity": {"storage": "1Ti"}, "hostPath": {"path": str(folder)}}
    name = space.namespace
    space.core.create_persistent_volume({"metadata": {"name": name}, "spec": spec | {"storageClassName": name}})
    yield name
    space.core.delete_persistent_volume(name)


@pytest.fixture(scope="module")
def volume(space, storage_class) -> Handover:
    """A shared volume, claimed as in the manifests."""
    (claim,) = render(MANIFESTS / "storage")
    claim["spec"]["storageClassName"] = storage_class
    space.core.create_namespaced_persistent_volume_claim(space.namespace, claim)
    source = {"name": "handover", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    return Handover("/handover", volumes=[source], mounts=[{"name": "handover", "mountPath": "/handover"}])


@pytest.fixture(scope="module")
def bucket(address) -> Handover:
    """A bucket in the emulator, which runs in this process."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    with create_server(address, port, in_memory=True, default_bucket="handover"):
        yield Handover("gs://handover/runs", env=[{"name": "STORAGE_EMULATOR_HOST", "value": f"http://{address}:{port}"}])


@pytest.fixture
def launch(space, inputs, pipeline_run):
    """A function that starts launchers of the run."""
    numbers = itertools.count(1)

    def start(handover, **flags):
        return Launcher(space, f"{pipeline_run.name}-try-{next(numbers)}", pipeline_run, handover, flags)

    return start


def test_two_nodes_are_like_one_process_and_hand_over_by_a_shared_volume(launch, volume, models):
    """No container may run as root."""
    launcher = launch(volume)
    launcher.wait_for_line("running on 2 nodes")
    nodes = launcher.nodes()
    assert nodes.keys() == {"master-0", "worker-0"}
    for pod in nodes.values():
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"] == {"cpu": "500m", "memory": "2Gi"}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["spec"]["serviceAccountName"] == "sparse-distill-worker"
        assert not [mount for mount in container["volumeMounts"] if "serviceaccount" in mount["mountPath"]]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    check_like_one(models, launcher.result())
    log = launcher.log()
    assert log.count("[PPL] epoch=1 eval_ppl=") == 1  # the launcher shows what the first node prints
    assert "created: PyTorchJob" in log


def test_requested_gpus_go_to_the_nodes_which_tell_when_they_cannot_use_them(launch, volume):
    """As when a driver is lost: this cluster's GPUs exist only on paper."""
    launcher = launch(volume, gpus=1, retries=0)
    launcher.wait_for_line("created: PyTorchJob")
    assert "nvidia.com/gpu" not in json.dumps(launcher.read()["spec"]["containers"][0]["resources"])
    (job,) = launcher.jobs()
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        (container,) = replicas["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "cpu": "500m", "memory": "2Gi"}
    log = launcher.wait_for_end("Failed")
    assert "error: gpus must be at most the 0 GPUs that can be used here, got 1\n" in log


def test_two_nodes_hand_over_by_a_bucket(launch, bucket, models, tmp_path, monkeypatch):
    launcher = launch(bucket)
    check_like_one(models, launcher.result())
    (job,) = launcher.jobs()
    for variable in bucket.env:
        monkeypatch.setenv(variable["name"], variable["value"])
    download(f"{bucket.place}/{launcher.run_id}/{job['metadata']['name']}/result", tmp_path / "result")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (models / "one", tmp_path / "result"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3)


def test_two_nodes_of_a_trainjob_are_like_one_process(launch, volume, models):
    launcher = launch(volume, kind="trainjob")
    check_like_one(models, launcher.result())
    (job,) = launcher.jobs(trainjob.KIND)
    assert "Complete" in [entry["type"] for entry in job["status"]["conditions"]]
    assert launcher.nodes().keys() == {"node-0-0", "node-0-1"}


def test_two_nodes_of_an_elastic_job_are_like_one_process(launch, volume, models):
    launcher = launch(volume, elastic="1:2", nproc_per_node=2, batch_size=1)
    stats = launcher.result()
    check_like_one(models, stats)
    assert stats["parameters"]["grad_accum_steps"] == 2  # for a global batch of 8 over 4 processes


@pytest.mark.parametrize("end", ["killed", "deleted"])
def test_a_node_that_is_lost_comes_back_and_the_run_goes_on_from_its_checkpoint(launch, volume, space, end):
    """Killed: the job's restart policy restarts its container. Deleted: a new pod takes its place.

    The other node fails with it, or stops at the checkpoint that both agree on, and is restarted in its pod.
    """
    launcher = launch(volume, max_steps=0, checkpoint_steps=5)
    wait_for("the nodes", lambda: len(launcher.nodes()) == 2)
    before = launcher.nodes()
    leader, victim = (before[node]["metadata"] for node in ("master-0", "worker-0"))
    wait_for("a checkpoint", lambda: "checkpoint: " in log_of(space, leader["name"]), PATIENCE)
    if end == "killed":
        run_in(space, victim["name"], "sh", "-c", "kill -KILL -1")
    else:
        space.core.delete_namespaced_pod(victim["name"], space.namespace, grace_period_seconds=0)
    launcher.wait_for_line("resuming from ")
    after = launcher.nodes()
    assert (after["worker-0"]["metadata"]["uid"] == victim["uid"]) == (end == "killed")
    assert after["master-0"]["metadata"]["uid"] == leader["uid"]
    assert after["master-0"]["status"]["containerStatuses"][0]["restartCount"] >= 1
    stats = launcher.result()
    steps = [step["step"] for step in stats["details"]["steps"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > STEPS
    assert stats["sparse_integrity_check"]["violations"] == 0


def check_trained_once(launcher: Launcher, steps: int) -> None:
    """Wait for a launcher's result, and check that its job was trained once: each step, in containers that never restarted."""
    stats = launcher.result()
    assert [step["step"] for step in stats["details"]["steps"]] == list(range(1, steps + 1))
    assert stats["sparse_integrity_check"]["violations"] == 0
    log = launcher.log()
    assert "adopting it" in log
    assert "resuming from" not in log
    for name, pod in launcher.nodes().items():
        assert [status["restartCount"] for status in pod["status"]["containerStatuses"]] == [0], name


def test_a_launcher_that_was_preempted_is_followed_by_one_that_adopts_its_job(launch, volume, pipeline_run):
    first = launch(volume)
    first.wait_for_line("running on 2 nodes")
    (job,), nodes = first.jobs(), first.nodes()
    assert job["metadata"]["ownerReferences"] == [pipeline_run.owner()]
    first.end("preempted")
    second = launch(volume)
    second.wait_for_line("adopting it")
    check_trained_once(second, STEPS)
    (adopted,) = second.jobs()
    assert adopted["metadata"]["uid"] == job["metadata"]["uid"]
    assert adopted["metadata"]["ownerReferences"] == [pipeline_run.owner()]
    uids = [{name: pod["metadata"]["uid"] for name, pod in found.items()} for found in (nodes, second.nodes())]
    assert uids[1].items() <= uids[0].items()  # a worker may have been removed after the master's success
    pipeline_run.delete()
    wait_for("the job's removal with its run", lambda: not second.jobs() and not second.nodes(), PATIENCE)


def test_launchers_that_end_at_any_moment_have_one_job_which_trains_once(launch, volume):
    """LAUNCHER_KILLS says how many; the job takes longer than they do, so that it runs at all of these moments."""
    random = Random(int(os.environ.get("LAUNCHER_SEED", "0")))
    kills = int(os.environ.get("LAUNCHER_KILLS", "3"))
    steps, jobs, told = 60 * kills, set(), []
    for _ in range(kills):
        launcher, seconds, how = launch(volume, max_steps=steps, epochs=kills), random.uniform(0, 20), random.choice(ENDS)
        time.sleep(seconds)
        jobs |= {job["metadata"]["uid"] for job in launcher.jobs()}
        told.append(f"{how} after {seconds:.1f} s, {'had adopted' if 'adopting it' in launcher.log() else 'had not adopted'}")
        assert launcher.phase() in ("Pending", "Running"), launcher.log()
        launcher.end(how)
        jobs |= {job["metadata"]["uid"] for job in launcher.jobs()}
    print(*told, sep="\n")
    last = launch(volume, max_steps=steps, epochs=kills)
    check_trained_once(last, steps)
    assert len(jobs | {job["metadata"]["uid"] for job in last.jobs()}) == 1


@pytest.mark.parametrize("end", ["terminated", "deleted"])
def test_when_the_run_ends_its_job_goes_too(launch, volume, pipeline_run, end):
    launcher = launch(volume)
    launcher.wait_for_line("created: PyTorchJob")
    wait_for("the nodes", lambda: len(launcher.nodes()) == 2)
    if end == "terminated":
        pipeline_run.terminate()
        launcher.end("preempted")  # it gets the same signal
    else:
        pipeline_run.delete()
    wait_for("the job's removal", lambda: not launcher.jobs())
    wait_for("the nodes' removal", lambda: not launcher.nodes(), PATIENCE)


def test_the_launcher_holds_the_deadline(launch, volume):
    launcher = launch(volume, max_steps=0, epochs=1000, deadline=30)  # the operator's count ends while nothing happens
    log = launcher.wait_for_end("Failed")
    assert re.search(r"^error: job \S+ still runs at its deadline of 30 s", log, re.MULTILINE)
    assert not launcher.jobs()


def test_an_image_that_is_not_there_is_told_soon_and_a_sweep_removes_the_job(launch, volume):
    launcher = launch(volume, image="sparse-distill/not-there:1")
    launcher.wait_for_line("created: PyTorchJob")
    launcher.wait_for_line("waits: (ErrImagePull|ImagePullBackOff): .*not-there", 60)
    sweep = ["python", "-m", "components.distill_distributed.sweep"]
    assert "deleted" in launcher.execute(*sweep, f"--run_id={launcher.run_id}", f"--handover={volume.place}")
    assert "was deleted" in launcher.wait_for_end("Failed")
    assert not launcher.jobs()


def test_a_job_that_fails_fails_the_stage_with_the_end_of_its_log(launch, volume):
    """Although the operator takes the nodes away, logs and all, when it sees that they have failed."""
    launcher = launch(volume, image=LAUNCHER_IMAGE, retries=0, job_file=f"{volume.place}/job")  # an image without torch
    log = launcher.wait_for_end("Failed")
    assert "No module named 'torch'" in log
    assert re.search(r"^error: job \S+ failed: PyTorchJobFailed: .*backoff limit", log, re.MULTILINE)
    assert launcher.nodes() == {}
    # both nodes or the one that failed first: the other may have been taken away before its container ran
    assert re.search(rf"the last lines of \S+-(master|worker)-0(, \S+-worker-0)? are in {volume.place}/job.logs", log)
