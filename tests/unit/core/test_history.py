"""The history of a checkpoint grows by one step per stage, and an invalid one is rejected."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kfp.dsl import Metrics

from components.core.checkpoint.files import weight_bytes
from components.core.history import (
    HISTORY_FILE,
    StageRecord,
    Stopwatch,
    known_perplexity,
    log_metrics,
    read_history,
    read_steps,
    stats_file,
    write_history,
)


@pytest.fixture
def changed(checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint that may be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "changed"))


def test_a_history_begins_at_the_folder_itself(checkpoint):
    assert read_history(checkpoint) == {"format": 1, "source": {"model_id": str(checkpoint), "revision": None}, "steps": []}


def test_history_grows_by_one_step_per_stage(checkpoint, tmp_path):
    history = {"format": 1, "source": {"model_id": "owner/name", "revision": "abc"}, "steps": []}
    folders, before = [], checkpoint
    for number, stage in enumerate(("fetch", "prune", "distill")):
        folder = Path(shutil.copytree(checkpoint, tmp_path / stage))
        record = StageRecord(stage, {"number": number}, measured={"perplexity": 2.0 + number}, versions={"torch": "2"})
        record.sparse_integrity_check = {"passed": True} if number else None
        record.details["steps"] = [1, 2, number]
        write_history(folder, history, record, before)
        history, before = read_history(folder), folder
        folders.append(folder)
    assert history["source"] == {"model_id": "owner/name", "revision": "abc"}
    assert [step["stage"] for step in history["steps"]] == ["fetch", "prune", "distill"]
    assert history["steps"][2] == {
        "stage": "distill",
        "parameters": {"number": 2},
        "measured": {"perplexity": 4.0, "bytes": weight_bytes(folders[2])},
        "sparse_integrity_check": {"passed": True},
        "versions": {"torch": "2"},
    }
    assert [len(read_history(folder)["steps"]) for folder in folders] == [1, 2, 3]
    stats = StageRecord.load(folders[2] / stats_file("distill"))
    assert stats.summary() == history["steps"][2]
    assert stats.details == {"steps": [1, 2, 2]}
    assert json.loads((folders[2] / "distill_stats.json").read_text())["sparse_integrity_check"] == {"passed": True}


def test_the_whole_records_of_all_steps_travel_with_a_model(checkpoint, tmp_path):
    history, before, made = read_history(checkpoint), checkpoint, []
    for number, stage in enumerate(("fetch", "prune", "distill", "prune", "quantize")):
        folder = Path(shutil.copytree(checkpoint, tmp_path / str(number)))
        (folder / "training_stats.json").write_text("not ours")
        made.append(StageRecord(stage, {"number": number}, details={"long": [number]}))
        write_history(folder, history, made[-1], before)
        history, before = read_history(folder), folder
    made[1] = replace(made[1], details={})  # the second pruning's record has replaced it
    assert read_steps(folder) == made
    names = [stats_file(stage) for stage in ("distill", "fetch", "prune", "quantize", "training")]
    assert sorted(file.name for file in folder.glob("*_stats.json")) == names


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": {}}', "{"])
def test_a_history_of_another_form_is_refused(changed, content):
    (changed / HISTORY_FILE).write_text(content)
    with pytest.raises(ValueError, match=HISTORY_FILE):
        read_history(changed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_record_with_what_is_not_finite_is_refused(changed, value):
    before = {file.name for file in changed.iterdir()}
    record = StageRecord("prune", {}, measured={"perplexity": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_history(changed, read_history(changed), record, changed)
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.save(changed / "prune_stats.json")
    assert {file.name for file in changed.iterdir()} == before


def test_a_file_that_is_not_a_record_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"stage": "prune", "unknown": 1}')
    with pytest.raises(ValueError, match=r"a\.json must be JSON of its form, parameters: Field required"):
        StageRecord.load(tmp_path / "a.json")


@pytest.mark.parametrize("stage", ["x" * 4000, "../../elsewhere", "", "prune\n"])
def test_a_stage_whose_name_cannot_be_part_of_a_file_name_is_refused(checkpoint, tmp_path, stage):
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    history = {"format": 1, "source": {"model_id": "m", "revision": None}, "steps": [{"stage": stage, "parameters": {}}]}
    (changed / HISTORY_FILE).write_text(json.dumps(history))
    with pytest.raises(ValueError, match=rf"{HISTORY_FILE} must be JSON of its form, steps\.0\.stage: String should match"):
        read_history(changed)


def test_a_perplexity_is_known_only_for_its_own_text():
    measured = {"perplexity": 3.5, "perplexity_text": "this"}
    history = {"steps": [{"measured": {"perplexity": 9.0, "perplexity_text": "that"}}, {"measured": measured}]}
    assert known_perplexity(history, "this") == 3.5
    assert known_perplexity(history, "that") is None
    assert known_perplexity({"steps": []}, "this") is None
    assert known_perplexity({"steps": [{"measured": {}}]}, "this") is None


def test_metrics_are_the_numbers_of_a_record_with_the_prefix_in_front():
    metrics = Metrics(uri="unused")
    log_metrics(StageRecord("quantize", {}, {"perplexity": 2.5, "bytes": 7, "engine": "x"}), metrics, prefix="int8_")
    assert metrics.metadata == {"int8_perplexity": 2.5, "int8_bytes": 7}


def test_memory_of_a_gpu_is_only_asked_for_where_the_process_uses_one(monkeypatch):
    """torch makes a context on the first GPU as soon as its peak is reset."""
    started: list[bool] = []
    reset: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(started))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(True))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 42)
    watch = Stopwatch()
    assert "peak_gpu_memory_bytes" not in watch.read()
    assert not reset
    started.append(True)
    assert watch.read()["peak_gpu_memory_bytes"] == 42
    Stopwatch()
    assert reset
