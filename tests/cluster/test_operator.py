"""The stand-in for Kubeflow's operators behaves as they do, shown by jobs that run a shell command."""

import time

import pytest

from components.images import CPU_IMAGE
from tests.cluster import pytorchjob, trainjob
from tests.cluster.launcher import run_in
from tests.cluster.operator import wait_for

SHOW_ENV = "env | sort"
ASLEEP = "exec sleep 600"
RESOLVE = "until getent hosts $PET_MASTER_ADDR; do sleep 0.2; done"


def template(command: str) -> dict:
    """A pod that runs a shell command; /scratch survives a restart of its container."""
    mount = {"name": "scratch", "mountPath": "/scratch"}
    container = {"name": "pytorch", "image": CPU_IMAGE, "command": ["sh", "-c", command], "volumeMounts": [mount]}
    spec = {"containers": [container], "volumes": [{"name": "scratch", "emptyDir": {}}], "terminationGracePeriodSeconds": 0}
    return {"spec": spec}


class Job:
    """A job in the cluster."""

    def __init__(self, space, kind, name, spec):
        group, version, plural = kind
        self.space, self.kind, self.name, self.path = space, kind, name, (group, version, space.namespace, plural)
        titles = {"pytorchjobs": "PyTorchJob", "trainjobs": "TrainJob"}
        body = {"apiVersion": f"{group}/{version}", "kind": titles[plural], "metadata": {"name": name}, "spec": spec}
        space.custom.create_namespaced_custom_object(*self.path, body)

    def exists(self) -> bool:
        jobs = self.space.custom.list_namespaced_custom_object(*self.path)["items"]
        return self.name in [job["metadata"]["name"] for job in jobs]

    def conditions(self) -> dict[str, dict]:
        status = self.space.custom.get_namespaced_custom_object(*self.path, self.name).get("status", {})
        return {entry["type"]: entry for entry in status.get("conditions", [])}

    def wait_for(self, condition: str) -> dict:
        """Wait until a condition is true; return it."""
        wait_for(f"{self.name} {condition}", lambda: self.conditions().get(condition, {}).get("status") == "True")
        return self.conditions()[condition]

    def pods(self) -> dict[str, dict]:
        label = {"pytorchjobs": pytorchjob.LABEL + "job-name", "trainjobs": trainjob.LABEL + "jobset-name"}[self.kind[2]]
        return self.space.pods(f"{label}={self.name}")

    def wait_for_running(self, count: int) -> dict[str, dict]:
        """Wait until `count` of its pods are running; return them."""

        def running():
            return {name: pod for name, pod in self.pods().items() if pod["status"]["phase"] == "Running"}

        wait_for(f"{count} running pods of {self.name}", lambda: len(running()) == count)
        return running()

    def environment(self, replica: str) -> dict[str, str]:
        """The environment of a pod that ran `env`."""
        log = self.space.core.read_namespaced_pod_log(f"{self.name}-{replica}", self.space.namespace)
        return dict(line.split("=", 1) for line in log.splitlines() if "=" in line)


@pytest.fixture
def pytorch_job(space):
    """A function that creates a PyTorchJob with one master and workers; its jobs are deleted at the end."""
    jobs = []

    def make(name, master, worker=None, workers=1, restart="OnFailure", policy=None, **more):
        replicas = {"Master": (1, master)} if master else {}
        replicas |= {"Worker": (workers, worker)} if worker else {}
        specs = {
            replica: {"replicas": count, "restartPolicy": restart, "template": template(command)}
            for replica, (count, command) in replicas.items()
        }
        run_policy = {"cleanPodPolicy": "Running", "backoffLimit": 3} | (policy or {})
        jobs.append(Job(space, pytorchjob.KIND, name, {"pytorchReplicaSpecs": specs, "runPolicy": run_policy, **more}))
        return jobs[-1]

    yield make
    for job in jobs:
        if job.exists():
            space.custom.delete_namespaced_custom_object(*job.path, job.name)


def test_the_pods_find_each_other_and_the_masters_success_is_the_jobs(pytorch_job):
    master = f"{RESOLVE}; {SHOW_ENV}; until test -e /scratch/end; do sleep 0.2; done"
    job = pytorch_job("plain", master, f"{RESOLVE}; {SHOW_ENV}", workers=2, nprocPerNode="4")
    phases = {"plain-master-0": "Running", "plain-worker-0": "Succeeded", "plain-worker-1": "Succeeded"}
    wait_for("the workers' end", lambda: {name: pod["status"]["phase"] for name, pod in job.pods().items()} == phases)
    assert "Succeeded" not in job.conditions()
    run_in(job.space, "plain-master-0", "touch", "/scratch/end")
    job.wait_for("Succeeded")
    assert list(job.conditions()) == ["Created", "Running", "Succeeded"]
    assert job.conditions()["Running"]["status"] == "False"
    for replica, rank in (("master-0", "0"), ("worker-0", "1"), ("worker-1", "2")):
        found = job.environment(replica)
        wanted = {"WORLD_SIZE": "12", "PET_NNODES": "3", "PET_NPROC_PER_NODE": "4", "PET_MASTER_PORT": "23456"}
        wanted |= {"RANK": rank, "PET_NODE_RANK": rank, "MASTER_ADDR": "plain-master-0", "PET_MASTER_ADDR": "plain-master-0"}
        assert wanted.items() <= found.items()


def test_a_worker_that_still_runs_when_the_master_succeeds_is_removed(pytorch_job):
    job = pytorch_job("early", "sleep 3", ASLEEP)
    job.wait_for("Succeeded")
    wait_for("the worker's removal", lambda: list(job.pods()) == ["early-master-0"])


def test_an_elastic_job_has_a_meeting_point_and_ends_with_any_workers_success(pytorch_job):
    elastic = {"minReplicas": 1, "maxReplicas": 2, "maxRestarts": 5, "rdzvId": "meeting"}
    command = f'{SHOW_ENV}; case "$HOSTNAME" in *-0) {ASLEEP};; esac'
    job = pytorch_job("elastic", None, command, workers=2, elasticPolicy=elastic, nprocPerNode="4")
    job.wait_for("Succeeded")
    wait_for("the other's removal", lambda: list(job.pods()) == ["elastic-worker-1"])
    found = job.environment("worker-1")
    wanted = {"PET_NNODES": "1:2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "elastic-worker-0:23456"}
    wanted |= {"PET_RDZV_ID": "meeting", "PET_MAX_RESTARTS": "5", "PET_NPROC_PER_NODE": "4"}
    assert wanted.items() <= found.items()
    assert not {"RANK", "PET_NODE_RANK", "MASTER_ADDR"} & found.keys()


def test_a_container_that_fails_starts_again_in_its_pod(pytorch_job):
    job = pytorch_job("again", "test -e /scratch/been && exit 0; touch /scratch/been; exit 7")
    job.wait_for("Succeeded")
    (status,) = job.pods()["again-master-0"]["status"]["containerStatuses"]
    assert status["restartCount"] == 1  # the first termination may no longer be recorded
    assert status["state"]["terminated"]["exitCode"] == 0


def test_a_job_at_its_backoff_limit_fails_and_takes_its_pods_away(pytorch_job):
    # a container that ends immediately would be in back-off, and only the restarts of running pods are counted
    job = pytorch_job("limit", "sleep 1; exit 7", ASLEEP, policy={"backoffLimit": 1})
    assert "backoff limit" in job.wait_for("Failed")["message"]
    wait_for("the removal of all pods", lambda: not job.pods())


def test_without_restarts_a_failure_is_final_and_the_failed_pod_stays(pytorch_job):
    job = pytorch_job("never", "exit 7", ASLEEP, restart="Never")
    assert job.wait_for("Failed")["reason"] == "PyTorchJobFailed"
    wait_for("the removal of the running pod", lambda: list(job.pods()) == ["never-master-0"])


def test_a_pod_that_is_gone_is_made_anew(pytorch_job):
    job = pytorch_job("gone", ASLEEP, ASLEEP)
    before = job.wait_for_running(2)
    job.wait_for("Running")
    job.space.core.delete_namespaced_pod("gone-worker-0", job.space.namespace, grace_period_seconds=0)
    wait_for("its removal", lambda: job.pods().get("gone-worker-0") != before["gone-worker-0"])
    after = job.wait_for_running(2)
    assert after["gone-master-0"]["metadata"]["uid"] == before["gone-master-0"]["metadata"]["uid"]
    assert after["gone-worker-0"]["metadata"]["uid"] != before["gone-worker-0"]["metadata"]["uid"]


def test_a_deadline_ends_a_job_only_when_something_happens_to_it(pytorch_job):
    job = pytorch_job("late", ASLEEP, policy={"activeDeadlineSeconds": 10})
    job.wait_for("Running")
    time.sleep(14)
    assert "Failed" not in job.conditions()
    change = {"metadata": {"annotations": {"something": "happens"}}}
    job.space.custom.patch_namespaced_custom_object(*job.path, job.name, change)
    assert "deadline" in job.wait_for("Failed")["message"]
    wait_for("the removal of all pods", lambda: not job.pods())


def test_a_suspended_job_has_no_pods_until_it_is_resumed(pytorch_job):
    job = pytorch_job("queued", "true", policy={"suspend": True})
    job.wait_for("Suspended")
    assert not job.pods()
    job.space.custom.patch_namespaced_custom_object(*job.path, job.name, {"spec": {"runPolicy": {"suspend": False}}})
    job.wait_for("Succeeded")
    assert job.conditions()["Suspended"]["reason"] == "PyTorchJobResumed"


def test_a_finished_job_goes_after_its_time_to_live_and_its_pods_with_it(pytorch_job):
    job = pytorch_job("brief", "true", policy={"ttlSecondsAfterFinished": 1})
    wait_for("the job's removal", lambda: not job.exists())
    wait_for("the removal of its pods", lambda: not job.pods())


def test_a_trainjobs_pods_find_each_other_and_all_must_succeed(space):
    patch = {"spec": {"containers": [{"name": "node"}], "terminationGracePeriodSeconds": 0}}
    patch["metadata"] = {"labels": {"mine": "yes"}}
    replicated = {"name": "node", "template": {"spec": {"template": patch}}}
    patches = [{"manager": "a/b", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}]
    trainer = {"image": CPU_IMAGE, "command": ["sh", "-c", f"{RESOLVE}; {SHOW_ENV}"], "numNodes": 2, "numProcPerNode": 4}
    spec = {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer, "runtimePatches": patches}
    job = Job(space, trainjob.KIND, "second", spec)
    job.wait_for("Complete")
    for rank in ("0", "1"):
        assert job.pods()[f"second-node-0-{rank}"]["metadata"]["labels"]["mine"] == "yes"
        wanted = {"PET_NODE_RANK": rank, "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"}
        wanted |= {"PET_MASTER_ADDR": "second-node-0-0.second", "PET_MASTER_PORT": "29500"}
        assert wanted.items() <= job.environment(f"node-0-{rank}").items()
