"""The process of a stage of a local run, and the folder of the run."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from kfp.dsl import Model
from kfp.local import subprocess_task_handler
from kfp.local.orchestrator import task_executor

from pipelines import local_stages, run_folder
from pipelines.local_stages import LocalStages
from pipelines.run_folder import is_complete, remove_outputs, remove_unfinished, set_complete, stage_folder, used_alone

SAYS = """
import sys
def stage():
    print("it says"); sys.stdout.buffer.write(b"\\xff\\nlast words"); sys.exit({code})
"""
STUBBORN = """
import signal, time
def stage():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def stages(tmp_path):
    with used_alone(tmp_path) as lock:
        yield LocalStages(tmp_path, lock, io.StringIO(), io.StringIO())


def command(folder, source):
    """As `kfp.local` makes it."""
    executor_input = json.dumps({"inputs": {}, "outputs": {"outputFile": str(folder / "stage" / "executor_output.json")}})
    return ["sh", "-ec", "", source, "--executor_input", executor_input, "--function_to_execute", "stage"]


@pytest.mark.parametrize("code", [0, 3])
def test_the_lines_and_the_exit_code_of_a_stage_come_back(stages, tmp_path, code):
    folder = tmp_path / "stage-1"
    assert stages.run(command(folder, SAYS.format(code=code))) == code
    assert stages.terminal.getvalue() == "== stage\nit says\n\ufffd\nlast words\n"
    assert "executor_input" in stages.log.getvalue()
    assert is_complete(folder) == (code == 0)


def test_a_stage_that_does_not_end_is_killed(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(local_stages, "GRACE_SECONDS", 0.5)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(stages.run(command(tmp_path / "stage-1", STUBBORN))))
    thread.start()
    while "ready" not in stages.terminal.getvalue():
        time.sleep(0.05)
    stages.stop(signal.SIGTERM, None)
    thread.join(20)
    assert codes == [-signal.SIGKILL]
    assert stages.run(command(tmp_path / "stage-1", STUBBORN)) == 1  # not started


def test_kfp_local_and_the_signals_are_left_as_they_were(stages):
    def replaced():
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        return task_executor.execute_single_task, subprocess_task_handler.run_local_subprocess, *handlers

    before = replaced()
    with pytest.raises(RuntimeError), stages.in_charge():
        assert not set(before) & set(replaced())
        raise RuntimeError("a stage failed")
    assert replaced() == before


def test_the_folder_is_free_once_the_stages_of_the_run_before_have_ended(tmp_path, capsys):
    with used_alone(tmp_path) as lock:
        (tmp_path / "tmp" / "left").touch()
        # stands for a stage that outlives its run.py
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=(lock.fileno(),))
        with pytest.raises(ValueError, match="run_dir must not be used by two run.py at once"), used_alone(tmp_path):
            pass
    with used_alone(tmp_path):
        assert capsys.readouterr().out == "waiting for a stage of the run before, which is about to end\n"
        assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "tmp").exists()


def made(folder):
    """A stage's folder with an output."""
    model = folder / "prune" / "pruned_model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    return model


def test_a_stage_is_complete_while_its_outputs_are_as_it_left_them(tmp_path):
    weights = made(tmp_path) / "model.safetensors"
    assert not is_complete(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    set_complete(tmp_path)
    assert is_complete(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    weights.write_bytes(b"weight")
    assert not is_complete(tmp_path)
    weights.unlink()
    assert not is_complete(tmp_path)
    (tmp_path / "done.json").write_text("{")
    assert not is_complete(tmp_path)
    assert not is_complete(tmp_path / "missing")


def test_the_key_stands_for_all_that_a_stage_depends_on(tmp_path, monkeypatch):
    model, config = Model(uri=str(made(tmp_path))), tmp_path / "zero.json"
    config.write_text("{}")

    def key(program="source", **changed):
        arguments = {"seq_len": 512, "config": str(config), "models": [model], "model": model} | changed
        return stage_folder("prune", [program], arguments)

    first = key()
    assert first == key()
    assert first.startswith("prune-")
    found = [first, key("other"), key(seq_len=256), key(model=Model(uri=str(tmp_path))), key(models=[model, model])]
    os.utime(config, (1, 1))
    found.append(key())
    os.utime(tmp_path / "prune" / "pruned_model" / "model.safetensors", (1, 1))
    found.append(key())
    monkeypatch.setattr(run_folder, "code_of", lambda stage: "changed")
    found.append(key())
    monkeypatch.setattr(run_folder, "versions", lambda: {"torch": "another"})
    found.append(key())
    assert len(set(found)) == len(found)


def test_what_a_killed_stage_left_is_removed_except_what_it_can_use(tmp_path):
    model = made(tmp_path)
    for name in (".pruned_model.1.partial", "pruned_model.teacher-1"):
        (model.parent / name).mkdir()
    for name in ("executor_output.json", "Output"):
        (model.parent / name).touch()
    set_complete(tmp_path)
    paths = {"pruned_model": model, "metrics": model.parent / "metrics"}
    artifacts = {name: {"artifacts": [{"uri": str(path)}]} for name, path in paths.items()}
    parameters = {"Output": {"outputFile": str(model.parent / "Output")}}
    outputs = {"artifacts": artifacts, "parameters": parameters, "outputFile": str(model.parent / "executor_output.json")}
    remove_outputs(tmp_path, outputs)
    assert [path.name for path in tmp_path.rglob("*")] == ["prune", "pruned_model.teacher-1"]


def test_a_finished_run_keeps_only_what_is_complete(tmp_path):
    for name in ("prune-1", "distill-1", "notes"):
        (tmp_path / name).mkdir()
    for name in ("prune-1", "distill-1"):
        (tmp_path / name / "component.py").touch()
    set_complete(tmp_path / "prune-1")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "prune-1"]


def test_a_task_is_not_tried_again_and_what_must_not_be_cached_runs_anew(stages, tmp_path):
    spec = local_stages.PipelineTaskSpec()
    spec.component_ref.name = "comp-publish"
    spec.retry_policy.max_retry_count = 2
    task = {
        "task_spec": spec,
        "components": {"comp-publish": SimpleNamespace(executor_label="exec")},
        "executors": {"exec": SimpleNamespace(container=SimpleNamespace(command=["sh"], args=[]))},
        "io_store": None,
    }
    for cached in (True, False):
        spec.caching_options.enable_cache = cached
        placed = stages._placed(task)
        folder = tmp_path / placed["pipeline_resource_name"]
        folder.mkdir(exist_ok=True)
        if cached:
            set_complete(folder)
        assert is_complete(folder) == cached
        assert placed["task_spec"].retry_policy.max_retry_count == 0
