"""What the benchmarks take for a failure."""

import shutil

import pytest

from tests.benchmarks.interruptions import contents, difference
from tests.benchmarks.memory import too_much
from tests.conftest import save_pruned


def test_an_interrupted_run_must_leave_all_but_times_as_it_would_have_been(tmp_path, corpus):
    save_pruned(tmp_path, corpus)
    pruned, other = tmp_path / "pruned", tmp_path / "other"
    wanted = contents(pruned)
    assert {"config.json", "compression.json", "prune_stats.json", "model.safetensors.index.json"} <= wanted.keys()
    shutil.copytree(pruned, other)
    record = other / "prune_stats.json"
    usual = record.read_text()
    record.write_text(usual.replace('"seconds": ', '"seconds": 1').replace(str(pruned), str(other)))
    assert record.read_text() != usual
    assert not difference(contents(other), wanted)
    record.write_text(usual.replace('"relative_error": 0.', '"relative_error": 0.1', 1))
    with (other / "model.safetensors.index.json").open("a") as index:
        index.write(" ")
    (other / "sparsity_mask.safetensors").unlink()
    (other / "left").touch()
    named = "left, model.safetensors.index.json, prune_stats.json, sparsity_mask.safetensors"
    assert difference(contents(other), wanted) == f"other content: {named}"


@pytest.mark.parametrize(
    ("smaller", "deeper", "missed"),
    [(1.0, 1.09, False), (1.0, 0.91, False), (1.0, 1.11, True), (1.0, 0.89, True), (1.19, 1.25, False), (1.21, 1.21, True)],
)
def test_memory_must_stay_within_its_limit_and_not_depend_on_the_depth(smaller, deeper, missed):
    assert too_much(smaller * 1e9, deeper * 1e9) is missed
