"""Watching and terminating a run, against a fake KFP API on loopback."""

import pytest

from pipelines import watch
from pipelines.submit import main
from tests.pipelines.argo import NAME, Argo, node_id
from tests.pipelines.fake_kfp import command, kfp  # noqa: F401 (fixtures)

# ruff: noqa: F811 (pytest passes fixtures by name)

SECRET = "hf_" + "aBcDeFgH" * 4
LOOP = ("root", "for-loop-1", "iteration-iterations({0}:{0})", "iteration-item", "quantize-format")
HANDLED = ("root", "exit-handler-1", "compress-on-nodes")
LOG = """\
I1124 08:00:01.000000       1 launcher_v2.go:166] PipelineTaskExecutorInput is large
[KFP Executor 2026-11-24 08:00:01,000 INFO]: Got executor_input:
{
    "inputs": {"parameterValues": {"seed": 0}}
}
prune: 1/30, 0:03 spent, 1:27 left
[PPL] before_pruning=29.6018
[PPL] after_pruning=109.1000
[KFP Executor 2026-11-24 08:03:01,000 INFO]: Wrote executor output file to /tmp/output.json.
I1124 08:03:20.000000       1 launcher_v2.go:300] publish success.
time="2026-11-24T08:03:21.000Z" level=info msg="sub-process exited" argo=true error="<nil>"
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.0)


@pytest.fixture
def run(kfp):
    """The id of a run that is there."""
    thing = {"display_name": "nightly", "experiment_id": "e", "state": "RUNNING", "created_at": "2026-11-24T08:00:00Z"}
    return kfp.add("runs", "run_id", thing)["run_id"]


def told(out):
    """What was told, without the time and the link."""
    lines = [line for line in out.splitlines() if line[:2].isdecimal() or line.startswith(" ")]
    return [line if line.startswith(" ") else line.partition(" ")[2] for line in lines]


@pytest.mark.parametrize("retries", [True, False], ids=["KFP 2.17", "before"])
@pytest.mark.parametrize("is_ui", [True, False], ids=["UI", "API server"])
def test_each_stage_is_told_when_it_begins_comes_from_the_cache_and_ends(kfp, command, retries, is_ui):
    kfp.is_ui = is_ui
    argo = Argo(retries)
    kfp.logs = {argo.pod(0, "root", "prune"): LOG, argo.pod(0, "root", "resolve"): "model=x\n"}
    kfp.run_answers = [
        "PENDING",
        ("RUNNING", argo.stage("resolve", "Running", ("Running", "")).workflow()),
        ("RUNNING", argo.stage("resolve", "Succeeded", ("Succeeded", ""), seconds=25).workflow()),
        ("RUNNING", argo.stage("fetch", "Running", start=30).workflow()),
        ("RUNNING", argo.stage("fetch", "Succeeded", cached=True, start=30).workflow()),
        ("RUNNING", argo.stage("prune", "Running", start=40).workflow()),
        ("RUNNING", argo.stage("prune", "Running", ("Running", ""), start=40).workflow()),
        ("SUCCEEDED", argo.stage("prune", "Succeeded", ("Succeeded", ""), start=40, seconds=200).workflow()),
    ]
    code, out, err = command(main, "--wait")
    assert (code, err) == (0, "")
    assert told(out) == [
        "PENDING",
        "resolve begins",
        "RUNNING: resolve",
        "resolve ended after 00:25",
        "fetch begins",
        "fetch is taken from the cache",
        "prune begins",
        "prune ended after 03:20, after_pruning=109.1000",
        "SUCCEEDED",
    ]


@pytest.mark.parametrize("retries", [True, False], ids=["KFP 2.17", "before"])
def test_of_a_stage_that_failed_the_name_is_told_once_and_the_end_of_its_log(kfp, command, retries):
    argo = Argo(retries)
    argo.stage("fetch", "Succeeded", cached=True, inside=HANDLED)
    argo.stage("prune", "Failed", ("Error", "pod deleted"), ("Failed", "OOMKilled (exit code 137)"), inside=HANDLED, seconds=70)
    argo.stage("sweep-jobs", "Succeeded", ("Succeeded", ""), inside=("root", "exit-handler-1.onExit"), start=90, seconds=5)
    end = ["Traceback (most recent call last):", '  File "x.py", line 1', f"ValueError: token={SECRET}", "Killed"]
    bars = "\r".join(f"\x1b[2K{step} %" for step in range(101))
    printed = [f"line {number}" for number in range(30)] + [bars, "x" * 5000, *end]
    plumbing = LOG.splitlines()
    first, last = (argo.pod(number, *HANDLED, "prune") for number in (0, 1))
    kfp.logs = {first: "the first try\n", last: "\n".join([*plumbing[:6], *printed, *plumbing[-3:]]).encode() + b"\n\xff\n"}
    kfp.run_answers = [("FAILED", argo.workflow())]
    code, out, err = command(main, "--wait")
    assert (code, err) == (1, "error: the run is FAILED: prune failed\n")
    lines = told(out)
    head, tail = lines[:2], lines[2:-2]
    assert head == [
        "fetch is taken from the cache",
        "prune failed after 01:10: OOMKilled (exit code 137); its log ends:",
    ]
    assert lines[-2:] == ["sweep-jobs ended after 00:05", "FAILED"]
    assert len(tail) == 20
    assert tail[:13] == [f"    line {number}" for number in range(17, 30)]
    assert tail[13] == "    [2K100 %"
    assert len(tail[14]) < 510
    assert tail[15:] == [f"    {line}".replace(SECRET, "***") for line in end] + ["    �"]
    assert SECRET not in out
    assert out.count("prune") == 1


def test_a_pod_that_is_lost_is_told_and_the_stage_goes_on(kfp, command):
    argo = Argo()
    kfp.run_answers = [
        ("RUNNING", argo.stage("distill", "Running", ("Running", "")).workflow()),
        ("RUNNING", argo.stage("distill", "Running", ("Error", "pod deleted")).workflow()),
        ("RUNNING", argo.stage("distill", "Running", ("Error", "pod deleted"), ("Running", "")).workflow()),
        ("SUCCEEDED", argo.stage("distill", "Succeeded", ("Error", "pod deleted"), ("Succeeded", ""), seconds=3700).workflow()),
    ]
    code, out, _ = command(main, "--wait")
    assert code == 0
    assert told(out) == [
        "distill begins",
        "RUNNING: distill",
        "distill is tried again: pod deleted",
        "distill ended after 1:01:40",
        "SUCCEEDED",
    ]


def test_a_stage_that_is_tried_again_as_a_whole_goes_on(kfp, command):
    argo = Argo().stage("distill", "Running", ("Error", "pod deleted"))
    first = argo.nodes[node_id(f"{NAME}(0).root(0).distill(0)")]
    first |= {"phase": "Error", "startedAt": "2026-11-24T08:00:01Z"}  # the node above it is of type Retry
    kfp.run_answers = [("RUNNING", argo.workflow()), "CANCELED"]
    code, out, err = command(main, "--wait")
    assert (code, err) == (1, "error: the run is CANCELED\n")
    assert told(out)[:2] == ["distill begins", "RUNNING: distill"]


def test_the_stages_of_a_loop_are_told_apart(kfp, command):
    argo = Argo()
    inside = [tuple(part.format(number) for part in LOOP) for number in (0, 1)]
    kfp.logs = {argo.pod(0, *inside[1], "quantize"): "[PPL] after_quantization=27.6000\n"}
    for number in (0, 1):
        argo.stage("quantize", "Running", ("Running", ""), inside=inside[number])
    running = argo.workflow()
    argo.stage("quantize", "Succeeded", ("Succeeded", ""), inside=inside[1], seconds=60)
    argo.stage("quantize", "Failed", ("Failed", "Error (exit code 1)"), inside=inside[0], seconds=9)
    kfp.run_answers = [("RUNNING", running), ("FAILED", argo.workflow())]
    code, out, err = command(main, "--wait")
    assert (code, err) == (1, "error: the run is FAILED: quantize 1 failed\n")
    assert sorted(told(out)[:2]) == ["quantize 1 begins", "quantize 2 begins"]
    assert "quantize 2 ended after 01:00, after_quantization=27.6000" in out
    assert "quantize 1 failed after 00:09: Error (exit code 1); its log cannot be read" in out


def test_a_stage_that_could_not_begin_is_named_by_its_driver(kfp, command):
    argo = Argo().stage("fetch", "Succeeded", ("Succeeded", "")).driver_fails("prune", "Error (exit code 1)")
    kfp.run_answers = [("FAILED", argo.workflow())]
    code, out, err = command(main, "--wait")
    assert (code, err) == (1, "error: the run is FAILED: prune-driver failed\n")
    assert "prune-driver failed after 00:00: Error (exit code 1)" in out


def test_a_run_of_another_profile_has_its_logs_there(kfp, command, run):
    kfp.multi_user = True
    argo = Argo().stage("prune", "Succeeded", ("Succeeded", ""))
    kfp.logs = {argo.pod(0, "root", "prune"): LOG}
    kfp.run_answers = [("SUCCEEDED", argo.workflow())]
    code, out, _ = command(main, "--run_id", run)
    assert code == 0
    assert "after_pruning=109.1000" in out


def test_a_login_page_is_no_log(kfp, command, monkeypatch):
    argo = Argo().stage("prune", "Failed", ("Failed", ""))
    monkeypatch.setattr(kfp, "log", lambda *_: (200, "text/html; charset=utf-8", "<html>Log in</html>"))
    kfp.run_answers = [("FAILED", argo.workflow())]
    _, out, _ = command(main, "--wait")
    assert "prune failed after 00:00: no reason given; its log cannot be read" in out
    assert "html" not in out


def test_a_kfp_that_hands_out_no_workflows_tells_the_states_alone(kfp, command, monkeypatch):
    monkeypatch.setattr(kfp, "workflow", lambda _: (404, {"message": "Not Found"}))
    kfp.run_answers = ["RUNNING", "FAILED"]
    code, out, err = command(main, "--wait")
    assert (code, err) == (1, "error: the run is FAILED\n")
    assert told(out) == ["RUNNING", "FAILED"]


def test_each_state_is_told_once_and_a_server_that_is_away_is_outlasted(kfp, command):
    kfp.run_answers = ["PENDING", "RUNNING", 503, 500, "RUNNING", "RUNNING", "SUCCEEDED"]
    code, out, err = command(main, "--wait", "--timeout", "60")
    assert (code, err) == (0, "")
    assert told(out) == ["PENDING", "RUNNING", "no answer, asking again", "RUNNING", "SUCCEEDED"]


def test_the_state_is_told_now_and_then_with_what_is_running(kfp, command, monkeypatch):
    monkeypatch.setattr(watch, "SECONDS_BETWEEN_LINES", 0.0)
    kfp.run_answers = [("RUNNING", Argo().stage("distill", "Running", ("Running", "")).workflow()), "RUNNING", "CANCELED"]
    code, out, err = command(main, "--wait")
    assert (code, err) == (1, "error: the run is CANCELED\n")
    assert told(out)[:3] == ["distill begins", "RUNNING: distill", "RUNNING: distill"]


def test_waiting_ends_at_the_timeout(kfp, command, monkeypatch):
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    kfp.run_answers = ["RUNNING"]
    code, _, err = command(main, "--wait", "--timeout", "0.05")
    assert code == 2
    assert err == "error: timeout must be longer than the run, got 0.05 seconds: it is RUNNING and goes on\n"


def test_interrupted_waiting_leaves_the_run_alone_and_says_how_to_go_on(kfp, command, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    kfp.run_answers = ["RUNNING"]
    ways = "--run_id runs-1 goes on watching it, --run_id runs-1 --terminate ends it"
    assert command(main, "--wait")[::2] == (2, f"error: waiting was interrupted, the run goes on: {ways}\n")
    assert kfp.things["runs"][0]["state"] == "RUNNING"


@pytest.mark.parametrize(("answer", "looks"), [(403, 1), (503, 4)])
def test_waiting_ends_at_a_refusal_and_when_the_server_stays_away(kfp, command, monkeypatch, answer, looks):
    monkeypatch.setattr(watch, "RETRIES", 3)
    kfp.run_answers = [answer]
    code, _, err = command(main, "--wait")
    assert code == 2
    assert err.startswith(f"error: KFP answered {answer} (")
    assert sum(request.startswith("GET runs/") for request in kfp.requests) == looks


@pytest.mark.parametrize("flags", [[], ["--wait"], ["--timeout", "60"]])
def test_a_run_that_is_there_is_watched_and_none_is_started(kfp, command, run, flags):
    kfp.run_answers = ["RUNNING", "SUCCEEDED"]
    code, out, err = command(main, "--run_id", run, *flags)
    assert (code, err) == (0, "")
    assert told(out) == ["RUNNING", "SUCCEEDED"]
    assert {request.partition(" ")[0] for request in kfp.requests} == {"GET"}


def test_a_run_is_terminated_and_nobody_waits(kfp, command, run):
    code, out, err = command(main, "--run_id", run, "--terminate")
    assert (code, out, err) == (0, f"run {run} is being terminated; its exit handler still runs\n", "")
    assert kfp.things["runs"][0]["state"] == "CANCELING"


def test_a_run_is_terminated_and_watched_to_its_end(kfp, command, run):
    kfp.run_answers = ["CANCELING", "FAILED"]
    code, out, err = command(main, "--run_id", run, "--terminate", "--wait")
    assert (code, err) == (1, "error: the run is FAILED\n")
    assert told(out) == ["CANCELING", "FAILED"]


def test_a_run_that_has_ended_or_is_not_there_cannot_be_terminated_or_watched(kfp, command, run):
    kfp.things["runs"][0]["state"] = "SUCCEEDED"
    code, out, err = command(main, "--run_id", run, "--terminate")
    assert (code, out, err.partition(":")[0], len(err.splitlines())) == (2, "", "error", 1)
    kfp.run_answers = ["RUNNING"]
    code, _, err = command(main, "--run_id", "runs-9")
    assert (code, err.startswith("error: KFP answered 404 (not found")) == (2, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run_id", "r", "--set", "prune_sparsity=0.5"], "set must not be given with run_id, which starts no run"),
        (["--run_id", "r", "--params", "p.yaml"], "params must not be given with run_id"),
        (["--run_id", "r", "--run_name", "x"], "run_name must not be given with run_id, which starts no run, got 'x'"),
        (["--run_id", "r", "--pipeline", "compress-distributed"], "pipeline must not be given with run_id"),
        (["--run_id", "r", "--no_cache"], "no_cache must not be given with run_id"),
        (["--run_id", "r", "--terminate", "--timeout", "5"], "timeout must be 0 without wait, got 5"),
        (["--terminate"], "terminate must be given with the run_id of the run to terminate"),
        (["--run_id", ""], "run_id must be a run's id, letters, digits and hyphens, or new, got ''"),
        (["--run_id", "../x"], "run_id must be a run's id"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_before_any_request(kfp, command, flags, message):
    code, out, err = command(main, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
    assert kfp.requests == []


def test_the_nodes_have_the_ids_that_argo_gives(monkeypatch):
    monkeypatch.setattr("tests.pipelines.argo.NAME", "file-passing-pipelines-j4dxj")
    assert node_id("file-passing-pipelines-j4dxj.print-text-3") == "file-passing-pipelines-j4dxj-2181251165"
