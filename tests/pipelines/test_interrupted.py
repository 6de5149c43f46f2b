"""A local run that is stopped or killed leaves no process and no temporary file, and the same command goes on with it."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from tests.conftest import save_tiny
from tests.pipelines.test_run import ROOT, SMALL

STEPS = 280  # enough for a signal to arrive while training
TORCHRUN = ["--distill_backend", "fsdp", "--distill_launcher", "torchrun", "--distill_nproc_per_node", "2"]


class Run:
    """A folder with a model and a text, in which `run.py` runs again and again."""

    def __init__(self, folder, corpus):
        self.folder, self.mark, self.temporary = folder, uuid.uuid4().hex, folder / "temporary"
        self.temporary.mkdir()
        save_tiny(folder / "dense", "qwen3", tied=True)
        self.flags = ["--model_id", "dense", "--train_data", corpus, "--eval_data", corpus, *SMALL]

    def start(self, run_dir, *flags):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(self.temporary), "TEST_MARK": self.mark}
        program = [sys.executable, ROOT / "pipelines" / "run.py"]
        command = [*program, "--run_dir", run_dir, *self.flags, "--distill_max_steps", STEPS, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([str(part) for part in command], cwd=self.folder, env=environment, text=True, **pipes)

    def finish(self, run_dir, *flags):
        process = self.start(run_dir, *flags)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        assert list(self.temporary.iterdir()) == []
        return out

    def interrupt(self, number, run_dir, line, *flags, after=0.0, whom="run"):
        """Send a signal once a line with this text has been printed; returns exit code, what was printed, and stderr.

        `whom`: `run` for run.py, `stage` for the stage's group of processes.
        """
        process = self.start(run_dir, *flags)
        printed = []
        for text in process.stdout:
            printed.append(text)
            if line in text:
                break
        else:
            raise AssertionError("".join(printed) + process.stderr.read())
        time.sleep(after)
        if whom == "run":
            process.send_signal(number)
        else:
            (stage,) = psutil.Process(process.pid).children()
            os.killpg(stage.pid, number)
        out, err = process.communicate(timeout=60)
        self.check_nothing_is_left()
        return process.returncode, "".join(printed) + out, err

    def processes(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def check_nothing_is_left(self):
        deadline = time.monotonic() + 15
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [process.cmdline() for process in left] == []
        assert list(self.temporary.iterdir()) == []

    def numbers(self, run_dir):
        (summary,) = (self.folder / run_dir).glob("report-*/report/report_files/summary.json")
        return [
            (row["name"], row["perplexity"], row["sparsity"], row["bytes"]) for row in json.loads(summary.read_text())["rows"]
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    return Run(tmp_path_factory.mktemp("interrupted"), corpus)


@pytest.fixture(scope="module")
def undisturbed(run):
    return run.finish("undisturbed")


def taken(out):
    return [line.split(":")[0].removeprefix("== ") for line in out.splitlines() if line.endswith("done before, taken as it is")]


def started(out):
    return [line.removeprefix("== ") for line in out.splitlines() if line.startswith("== ") and ":" not in line]


def test_whatever_ends_a_run_the_same_command_goes_on_to_the_same_numbers(run, undisturbed):
    """One run that meets every signal, at a stage each."""
    code, _, _ = run.interrupt(signal.SIGKILL, "run", "== tokenize", after=1)
    assert code == -signal.SIGKILL

    code, out, err = run.interrupt(signal.SIGTERM, "run", "== prune", after=3)
    assert code == 128 + signal.SIGTERM
    assert err == f"stopped; the same command with --run_dir {run.folder / 'run'} goes on from here\n"
    assert taken(out) == ["fetch"]
    assert not list((run.folder / "run").rglob("*.partial"))
    assert not (run.folder / "run" / "tmp").exists()

    code, out, _ = run.interrupt(signal.SIGTERM, "run", "checkpoint: ")
    assert code == 128 + signal.SIGTERM
    assert taken(out) == ["fetch", "tokenize"]
    assert "stopped after step" in out

    code, out, _ = run.interrupt(signal.SIGKILL, "run", "checkpoint: ")
    assert code == -signal.SIGKILL
    assert taken(out) == ["fetch", "tokenize", "prune"]
    assert "resuming from" in out

    code, out, err = run.interrupt(signal.SIGINT, "run", "quantizing to")
    assert code == 128 + signal.SIGINT
    assert err.startswith("stopped; the same command")
    assert "resuming from" in out
    assert not list((run.folder / "run").glob("*/checkpoints"))

    out = run.finish("run")
    assert taken(out) == ["fetch", "tokenize", "prune", "distill"]
    assert started(out) == ["resolve", "quantize", "quantize", "report", "publish"]
    assert run.numbers("run") == run.numbers("undisturbed")
    assert len((run.folder / "run" / "run.log").read_text().split("Running pipeline")) == 1 + 6


def test_a_finished_run_is_taken_as_it_is(run, undisturbed):
    assert taken(undisturbed) == []
    out = run.finish("undisturbed")
    assert started(out) == ["resolve", "publish"]
    assert taken(out) == ["fetch", "tokenize", "prune", "distill", "quantize", "quantize", "report"]


def test_what_was_deleted_is_made_anew(run, undisturbed):
    (page,) = (run.folder / "undisturbed").glob("report-*/report/report_files/report.html")
    page.unlink()
    assert started(run.finish("undisturbed")) == ["resolve", "report", "publish"]
    assert page.is_file()


def test_a_changed_parameter_redoes_what_depends_on_it(run, undisturbed):
    """Checkpoints of other parameters do not stop it, and do not stay."""
    run.interrupt(signal.SIGTERM, "undisturbed", "checkpoint: ", "--distill_learning_rate", "2e-3")
    out = run.finish("undisturbed", "--distill_max_steps", 4, "--quantize_formats", "int8")
    assert taken(out) == ["fetch", "tokenize", "prune"]
    assert started(out) == ["resolve", "distill", "quantize", "report", "publish"]
    assert "distill: the checkpoints here are of other parameters or inputs, so it starts from the beginning\n" in out
    assert "resuming" not in out
    assert not list((run.folder / "undisturbed").glob("*/checkpoints"))
    assert len(list((run.folder / "undisturbed").glob("distill-*"))) == 2  # the finished ones


@pytest.mark.parametrize("whom", ["run", "stage"])
def test_processes_of_torchrun_end_too(run, undisturbed, whom):
    """They have groups of their own. A stage is killed together with torchrun, by `run.py` or for lack of memory."""
    port = {"run": 29431, "stage": 29432}[whom]
    code, out, err = run.interrupt(
        signal.SIGKILL, "undisturbed", "checkpoint: ", *TORCHRUN, "--distill_master_port", port, whom=whom
    )
    assert "distilled in" not in out
    assert code == (-signal.SIGKILL if whom == "run" else 2), err


def test_two_at_once_are_refused(run, undisturbed):
    first = run.start("undisturbed")
    assert first.stdout.readline() == "== resolve\n"
    first.send_signal(signal.SIGSTOP)
    second = run.start("undisturbed")
    _, err = second.communicate()
    first.send_signal(signal.SIGCONT)
    place = run.folder / "undisturbed"
    assert second.returncode == 2
    assert err == f"error: run_dir must not be used by two run.py at once, another one is running in {place}\n"
    first.communicate()
    assert first.returncode == 0


def test_a_folder_with_something_else_is_refused(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    process = run.start(tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err == f"error: run_dir must not exist yet, or hold a run to go on with, got {tmp_path}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
