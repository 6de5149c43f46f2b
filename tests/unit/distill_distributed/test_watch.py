"""Watching a job: what is reported about its pods, and when the watcher gives up."""

import re

import pytest

from components.distill_distributed import cluster, logs, watch
from components.distill_distributed.cluster import Cluster
from components.distill_distributed.watch import RUNNING_SINCE, GivenUpError, JobError
from tests.unit.distill_distributed.conftest import JOBS, MASTER, WORKER, asked, ending, follow, shown
from tests.unit.distill_distributed.fake_api import NAMESPACE, RESOURCES, ended

pytestmark = pytest.mark.timeout(30)


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
        clock.now += 100_000  # time in a queue does not count towards the deadline
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


def test_each_restart_is_reported_with_exit_code_and_last_lines(api, capsys):
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
        f"{WORKER} ended with exit code 137 (OOMKilled)",
        f"{WORKER} ended with exit code 1 (Error)",
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
        del api.objects["v1/pods", NAMESPACE, WORKER]  # as the operator does
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


def test_why_a_node_failed_is_known_although_its_pod_is_taken_away_at_once(api, capsys, tmp_path):
    """As the operator does: nobody sees the container's end, and no log can be read after it."""

    def go():
        api.run(MASTER, WORKER)
        api.say(MASTER, "step 1")
        api.say(WORKER, "ModuleNotFoundError: No module named 'torch'", "token=hf_abcdefghijklmnop")
        yield
        for pod in (MASTER, WORKER):
            del api.objects["v1/pods", NAMESPACE, pod]
        api.lines.clear()
        api.state("Failed", reason="PyTorchJobFailed", message="it has reached the specified backoff limit")
        yield

    with pytest.raises(JobError, match="backoff limit; no container left an exit code"):
        follow(api, go(), place=tmp_path / "logs")
    printed = capsys.readouterr().out
    assert printed.count(f"{WORKER}| ModuleNotFoundError: No module named 'torch'") == 1
    assert printed.count(f"{MASTER}| step 1") == 1  # it was shown before
    assert f"the last lines of {MASTER}, {WORKER} are in {tmp_path / 'logs'}" in printed
    saved = (tmp_path / "logs" / f"{WORKER}.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in saved] == ["ModuleNotFoundError: No module named 'torch'", "token=***"]


def test_of_a_node_the_lines_before_its_restart_are_kept_and_memory_is_bounded(api, tmp_path):
    def go():
        api.run(MASTER, WORKER)
        api.say(WORKER, "the first run", "x" * 10_000)
        yield
        api.say(WORKER, "seen by no poll", previous=True)
        api.pod(WORKER, restarts=1, last=ended(1, "Error"))
        api.lines[WORKER, False] = []
        api.say(WORKER, *(f"the second run {number}" for number in range(logs.KEPT_LINES - 2)))
        yield
        api.state("Failed")
        yield

    with pytest.raises(JobError):
        follow(api, go(), place=tmp_path)
    saved = [line.partition(" ")[2] for line in (tmp_path / f"{WORKER}.log").read_text().splitlines()]
    assert len(saved) == logs.KEPT_LINES
    assert len(saved[0]) < logs.KEPT_CHARACTERS
    assert saved[1:3] == ["seen by no poll", "the second run 0"]


def test_a_place_that_cannot_be_written_does_not_hide_why_the_job_failed(api, capsys, tmp_path):
    (tmp_path / "file").write_text("no folder")

    def go():
        api.run(MASTER, WORKER)
        api.say(MASTER, "RuntimeError")
        yield
        api.state("Failed", reason="PyTorchJobFailed")
        yield

    with pytest.raises(JobError, match="PyTorchJobFailed"):
        follow(api, go(), place=tmp_path / "file" / "logs")
    assert "the last lines of the nodes could not be saved: " in capsys.readouterr().out


@pytest.mark.parametrize("fault", [500, "reset"])
def test_a_machine_whose_logs_cannot_be_read_is_no_reason_to_end(api, capsys, fault):
    def go():
        api.run(MASTER, WORKER)
        for number in range(3):
            api.say(MASTER, f"step {number}")
            yield
        yield from ending(api)

    api.fail("GET", f"{WORKER}/log", fault, times=100)
    follow(api, go())
    assert shown(capsys) == [f"step {number}" for number in range(3)]


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
        clock.now += 3600 - 60
        yield
        yield
        clock.now += 60 - 3 * watch.POLL_SECONDS
        yield
        raise AssertionError("the launcher has not held the deadline")

    with pytest.raises(GivenUpError, match="job distill-1 still runs at its deadline of 3600 s"):
        follow(api, go())


def test_the_next_launcher_counts_on_from_where_the_job_began_to_run(api, clock, capsys):
    def go():
        api.run(MASTER, WORKER)
        api.state("Running")
        yield
        clock.now += 3000
        yield
        yield from ending(api)

    follow(api, go())
    since = api.job()["metadata"]["annotations"]
    assert set(since) == {RUNNING_SINCE}

    def go_on():
        api.pod(WORKER, "Pending")  # restarting is no reason to count anew
        api.state("Restarting")
        clock.now += 600
        yield
        raise AssertionError("the launcher has not held the deadline")

    with pytest.raises(GivenUpError, match="at its deadline of 3600 s"):
        follow(api, go_on(), annotations=since)
    assert f"running since {since[RUNNING_SINCE]}" in capsys.readouterr().out


def test_time_in_a_queue_is_not_counted_by_the_next_launcher_either(api, clock):
    def go():
        api.run(MASTER, WORKER)
        api.state("Suspended", message="preempted")
        yield
        clock.now += 100_000
        api.state("Running")
        yield
        clock.now += 3000
        yield
        yield from ending(api)

    follow(api, go(), annotations={RUNNING_SINCE: "2020-01-01T00:00:00+00:00"})
    assert api.job()["metadata"]["annotations"][RUNNING_SINCE] > "2025"


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
