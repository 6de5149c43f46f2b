"""Pruning in several processes over gloo: the result of one process, and the end of all when one fails or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from components.core.mask.integrity import integrity
from components.core.mask.mask import load_mask
from components.prune.calibration import divide
from components.prune.config import PruneConfig
from components.prune.stage import run
from tests.conftest import save_tiny

ROOT = Path(__file__).parents[3]
SMALL = {"nsamples": 8, "seq_len": 32, "eval_blocks": 2, "eval_seq_len": 32}
FIRM = {"damping": 1}  # with the usual one, the order of sums decides much: six words make Hessians that are nearly singular
UNEVEN = {"pattern": "2:4", "sparsity": 0.5, "nsamples": 32, "refit": 100} | FIRM
BEST = {"effort": "best", "method": "wanda", "reconstruct_epochs": 1} | FIRM
LAYERS = 8  # so that there is time to kill a run between its first and its last block


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
    """A folder with a model of many blocks, `dense`, and what one process and two make of it, `one` and `two`."""
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "dense", "qwen3", tied=True, num_hidden_layers=LAYERS)
    run(PruneConfig(**settings(folder, corpus, "one")))
    finish(start(folder, corpus, "two", 2))
    return folder


def settings(folder, corpus, name, **changes):
    """In float32 throughout: sums in another order may round to other numbers in bfloat16, a hundredth apart."""
    places = {"dense_model": str(folder / "dense"), "output_dir": str(folder / name), "dtype": "float32"}
    return places | {"calibration_data": str(corpus), "eval_data": str(corpus)} | SMALL | changes


def start(folder, corpus, name, processes, **changes):
    """Start the stage as a command."""
    flags = settings(folder, corpus, name, nproc_per_node=processes, **changes)
    line = [sys.executable, "-m", "components.prune", *(f"--{key}={value}" for key, value in flags.items())]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process, code=0):
    """Wait for the stage to end; returns what it printed to its output and as errors."""
    try:
        out, err = process.communicate(timeout=180)
    finally:
        for one in family(process):
            one.kill()
    assert process.returncode == code, out + err
    return out, err


def family(process):
    """The stage's process, torchrun, and the processes that prune, in their order."""
    if process.poll() is not None:
        return []
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def after_a_block(process, folder, name):
    """Wait until a block is finished, and stop all processes; returns them."""
    while not list(folder.glob(f".{name}.*/work/finished-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    found = family(process)
    for one in found:
        one.send_signal(signal.SIGSTOP)
    return found


def record(folder, name):
    return json.loads((folder / name / "prune_stats.json").read_text())


def contents(folder, name):
    return [(folder / name / file).read_bytes() for file in ("model.safetensors", "sparsity_mask.safetensors")]


@pytest.mark.parametrize(("processes", "changes"), [(2, FIRM), (3, UNEVEN), (2, BEST), (2, FIRM | {"allocation": "owl"})])
def test_several_processes_prune_like_one(tmp_path, corpus, processes, changes):
    """With three, the rows of calibration text are not even, and one process has no evaluation text.

    A model of two blocks: scores that are nearly tied, and fall otherwise in the first, change the inputs of all that follow.
    """
    save_tiny(tmp_path / "dense", "qwen3", tied=True)
    run(PruneConfig(**settings(tmp_path, corpus, "one", **changes)))
    out, err = finish(start(tmp_path, corpus, "several", processes, **changes))
    assert (out.count("[PPL] after_pruning="), err) == (1, "")  # only one process prints
    wanted, found = record(tmp_path, "one"), record(tmp_path, "several")
    assert found["sparse_integrity_check"] == wanted["sparse_integrity_check"]
    # a step of Adam is as long for gradients that are nearly zero, whose signs rounding decides
    trained = "reconstruction" in wanted["details"]
    for measured, within in {"perplexity_before": 1e-5, "perplexity": 2e-2 if trained else 1e-3}.items():
        assert found["measured"][measured] == pytest.approx(wanted["measured"][measured], rel=within)
    for theirs, ours in zip(*(each["details"].get("reconstruction", []) for each in (wanted, found)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)
    for theirs, ours in zip(wanted["details"]["layers"], found["details"]["layers"], strict=True):
        assert ours["sparsity"] == theirs["sparsity"]
        within = 5e-2 if theirs["block"] else 1e-3
        for measured in ("relative_error", "relative_error_of_method", "condition", "damping"):
            assert ours[measured] == pytest.approx(theirs[measured], rel=within, abs=1e-6)
    for theirs, ours in zip(wanted["details"]["allocations"], found["details"]["allocations"], strict=True):
        assert ours == theirs | {"divergence": pytest.approx(theirs["divergence"], rel=1e-3)}
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "several")]
    masks = [load_mask(tmp_path / name) for name in ("one", "several")]
    for name, kept in masks[0].tensors.items():
        if ".layers.0." not in name:  # what falls otherwise there changes the inputs of the next block
            continue
        same = (kept == masks[1].tensors[name]).all(1)  # of a row's weights, one that falls otherwise moves those after it
        assert same.float().mean() > 0.9
        one, several = (tensors[name][same] for tensors in weights)
        assert (one - several).norm() < 3e-3 * one.norm()
    assert integrity(weights[1], masks[1])["passed"]


def test_a_killed_process_ends_the_run_which_goes_on_and_ends_as_it_would_have(folder, corpus):
    first = start(folder, corpus, "killed", 2)
    *_, last = others = after_a_block(first, folder, "killed")
    _, err = finish(start(folder, corpus, "killed", 2), code=2)
    assert err.startswith("error: output_dir must not be in use by another run")
    assert err.count("\n") == 1
    last.kill()
    for one in others[:-1]:
        one.send_signal(signal.SIGCONT)
    out, err = finish(first, code=128 + signal.SIGKILL)
    assert err == "error: process 1 was ended by SIGKILL\n"
    assert "what has been finished is kept" in out
    out, err = finish(start(folder, corpus, "killed", 2))
    assert "pruning: going on after the" in out
    assert contents(folder, "killed") == contents(folder, "two")
    for measured in ("perplexity_before", "perplexity"):
        assert record(folder, "killed")["measured"][measured] == record(folder, "two")["measured"][measured]
    assert list(folder.glob(".*")) == []


def test_all_end_with_the_stage_and_another_number_of_processes_begins_anew(folder, corpus, capsys):
    first = start(folder, corpus, "other", 2)
    others = after_a_block(first, folder, "other")
    first.kill()
    for one in others:
        one.send_signal(signal.SIGCONT)
    assert psutil.wait_procs(others[1:], timeout=20)[1] == []
    first.communicate()
    run(PruneConfig(**settings(folder, corpus, "other")))
    out = capsys.readouterr().out
    assert "what a run with other settings or inputs left unfinished is removed" in out
    assert "going on" not in out
    assert contents(folder, "other") == contents(folder, "one")
    assert list(folder.glob(".*")) == []


def test_what_one_process_finds_wrong_ends_all_in_one_line_and_leaves_nothing(folder, corpus, tmp_path):
    """The Hessian of a layer that the second process prunes is not finite; those of the first one are."""
    save_tiny(tmp_path / "dense", "qwen3", tied=True)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    for name in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"):
        weights[f"model.layers.1.{name}.weight"] *= 1e30 if "norm" in name else 1e-30
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    _, err = finish(start(tmp_path, corpus, "out", 2, skip_ppl_eval=True), code=2)
    assert err == (
        "error: dtype must hold the activations: the Hessian of model.layers.1.mlp.gate_proj is not finite; try bfloat16\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


PROGRAM = """
import sys
import torch
from torch import nn
from components.core import processes
from components.core.walk.stream import Batch
from components.prune.calibration import hessians, observe

class Experts(nn.Module):
    \"\"\"The first two rows go to one expert, the third to the other, all through `down`.\"\"\"

    def __init__(self):
        super().__init__()
        self.one, self.other, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden):
        return torch.cat([self.down((self.one if row.sum() > 0 else self.other)(row)) for row in hidden])

torch.manual_seed(0)
block, hidden = Experts(), torch.randn(3, 5, 8).abs() * torch.tensor([1, 1, -1])[:, None, None]
groups = hessians(block, observe(block, [Batch(range(3), hidden, ((), {}))]), "")  # before there are others to add up with
alone = {group.names[0]: group.hessian for group in groups}
processes.join(torch.device("cpu"))
rows = range(0, 2) if processes.is_main() else range(2, 3)
found = hessians(block, observe(block, [Batch(rows, hidden[rows.start : rows.stop], ((), {}))]), "")
assert [name for group in found for name in group.names] == ["one", "other", "down"]
for group in found:
    assert (group.hessian is not None) == (group.process == processes.rank())
    if group.hessian is not None:
        torch.testing.assert_close(group.hessian, alone[group.names[0]])
assert {group.process for group in found} == {0, 1}
block.idle = nn.Linear(8, 8)
try:
    hessians(block, observe(block, [Batch(rows, hidden[rows.start : rows.stop], ((), {}))]), "layers.0")
finally:
    processes.leave()
"""


def test_experts_that_see_tokens_in_one_process_only_have_the_hessian_of_one_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [sys.executable, *launcher, str(tmp_path / "program.py")]
    ended = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert (
        "ValueError: nsamples must be large enough for layers.0.idle to see at least 1 of the tokens, it saw 0; with"
        in ended.stderr
    )
    assert "AssertionError" not in ended.stderr, ended.stderr


def test_the_largest_work_is_given_first_to_whom_has_least():
    assert divide([3, 9, 4, 4], 2) == [1, 0, 1, 1]
    assert divide([1, 1, 1], 2) == [0, 1, 0]
    assert divide([5], 3) == [0]
    assert divide([7, 7], 1) == [0, 0]
