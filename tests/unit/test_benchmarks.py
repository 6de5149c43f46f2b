"""What the benchmarks take for a failure."""

import shutil

from tests.benchmarks.interruptions import contents, difference
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
