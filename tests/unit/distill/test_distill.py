"""Training under the mask: zeros stay zero, frozen weights do not change, the loop follows the settings."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.core.checkpoint.loading import open_model
from components.core.history import read_history
from components.core.mask.file import MASK_FILE
from components.core.mask.integrity import SparsityError, integrity
from components.core.mask.mask import load_mask
from components.distill import backends
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig
from components.distill.loop import Trainer, plan, rows_used
from components.distill.masking import mask_gradients, mask_weights
from components.distill.schedule import cosine_with_warmup
from components.distill.stage import run
from components.distill.teacher import make_teacher
from components.prune.config import PruneConfig
from components.prune.stage import run as prune
from tests.conftest import save_tiny

LENGTHS = {"eval_blocks": 4, "eval_seq_len": 32}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, corpus):
    """A folder with a dense tiny model and its pruned student."""
    folder = tmp_path_factory.mktemp("distill")
    save_tiny(folder / "dense", "qwen3", tied=True)
    prune(
        PruneConfig(
            dense_model=str(folder / "dense"),
            output_dir=str(folder / "pruned"),
            calibration_data=str(corpus),
            eval_data=str(corpus),
            nsamples=8,
            seq_len=32,
            **LENGTHS,
        )
    )
    return folder


def settings(folder, corpus, output, **changes) -> DistillConfig:
    plain = {
        "teacher_model": str(folder / "dense"),
        "student_model": str(folder / "pruned"),
        "mask_file": str(folder / "pruned" / MASK_FILE),
        "output_dir": str(output),
        "train_data": str(corpus),
        "eval_data": str(corpus),
        "seq_len": 32,
        "batch_size": 2,
        "grad_accum_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 20,
    }
    return DistillConfig(**(plain | LENGTHS | changes))


def trainer(folder, corpus, tmp_path, cache=None, **changes) -> Trainer:
    config = settings(folder, corpus, tmp_path / "out", **changes)
    cpu = torch.device("cpu")
    student, weights = open_model(config.student_model, torch.float32, cpu)
    blocks = torch.randint(256, (40, 32), generator=torch.Generator().manual_seed(1))
    mask = load_mask(config.mask_file)
    backend = SingleProcess(config, cpu, torch.float32)
    used = rows_used(len(blocks), config, 1)
    teacher = make_teacher(Path(config.teacher_model), blocks, used, cache, backend, torch.float32, False)
    backend.prepare(student, weights, mask, plan(len(blocks), config, 1)[1])
    return Trainer(backend, teacher, blocks, None, config, {"mask": mask.fingerprint()})


def curve(progress):
    """The steps' entries without their times."""
    return [{name: value for name, value in step.items() if name != "seconds"} for step in progress.steps]


def test_zeros_are_exactly_zero_after_20_steps_with_weight_decay(pruned, corpus, tmp_path):
    run = trainer(pruned, corpus, tmp_path, weight_decay=0.1, learning_rate=1e-2, epochs=2)
    before = {name: value.clone() for name, value in run.backend.student.state_dict().items()}
    progress = run.fit()
    assert len(progress.steps) == 20
    mask = load_mask(pruned / "pruned")
    for name, parameter in run.backend.student.named_parameters():
        if name in mask.tensors:
            assert (parameter[~mask.tensors[name]] == 0).all()
            assert (parameter[mask.tensors[name]] != before[name][mask.tensors[name]]).float().mean() > 0.9
            for moment in ("exp_avg", "exp_avg_sq"):
                assert (run.backend.optimizer.state[parameter][moment][~mask.tensors[name]] == 0).all()
        else:
            assert torch.equal(parameter, before[name]), name
    assert progress.steps[-1]["loss"] < progress.steps[0]["loss"]


def test_without_masking_the_check_fails(pruned, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "mask_gradients", lambda *_: None)
    monkeypatch.setattr(backends, "mask_weights", lambda *_: None)
    with pytest.raises(SparsityError, match=r"zero outside its mask.*model\.layers"):
        run(settings(pruned, corpus, tmp_path / "out", max_steps=2))
    assert not list(tmp_path.iterdir())


def test_a_violation_can_be_recorded_instead(pruned, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "mask_gradients", lambda *_: None)
    monkeypatch.setattr(backends, "mask_weights", lambda *_: None)
    run(settings(pruned, corpus, tmp_path / "out", max_steps=1, fail_on_sparse_violation=False))
    check = json.loads((tmp_path / "out" / "distill_stats.json").read_text())["sparse_integrity_check"]
    assert not check["passed"]
    assert check["violations"] > 0


def test_gradients_and_weights_are_masked():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.full((2, 3), torch.nan)
    pruned = {"w": torch.tensor([[True, False, True], [False, False, True]])}
    mask_gradients({"w": weight}, pruned)
    mask_weights({"w": weight}, pruned)
    assert (weight.grad[pruned["w"]] == 0).all()
    assert torch.isnan(weight.grad[~pruned["w"]]).all()
    assert weight.detach().tolist() == [[0, 1, 0], [1, 1, 0]]


def test_accumulated_batches_give_the_gradient_of_one_batch(pruned, corpus, tmp_path):
    """Two steps, so that a wrong scale shows through Adam's second moment and the clipping."""
    results = []
    for batch_size, accumulate in ((4, 1), (1, 4)):
        run = trainer(pruned, corpus, tmp_path, batch_size=batch_size, grad_accum_steps=accumulate, max_steps=2)
        results.append((curve(run.fit()), run.backend.student.state_dict()))
    for left, right in zip(results[0][0], results[1][0], strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-3, atol=1e-5)


def test_same_seed_same_weights_other_seed_other_order(pruned, corpus, tmp_path):
    runs = [trainer(pruned, corpus, tmp_path, seed=seed, max_steps=2) for seed in (0, 0, 1)]
    losses = [curve(run.fit()) for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    for left, right in zip(runs[0].backend.student.parameters(), runs[1].backend.student.parameters(), strict=True):
        assert torch.equal(left, right)


def test_an_epoch_sees_each_block_once_in_another_order(pruned, corpus, tmp_path):
    run = trainer(pruned, corpus, tmp_path, max_steps=0)
    epochs = [[row for step in range(10) for part in run._rows(first + step) for row in part.tolist()] for first in (0, 10)]
    for seen in epochs:
        assert sorted(seen) == list(range(40))
    assert epochs[0] != epochs[1]


def test_learning_rate_rises_and_falls_and_is_never_lost():
    rates = [cosine_with_warmup(step, 4, 20) for step in range(20)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] > 0
    assert cosine_with_warmup(0, 0, 1) == 1


def test_stage_writes_stats_history_and_lines(pruned, corpus, tmp_path, capsys):
    record = run(settings(pruned, corpus, tmp_path / "out", epochs=2, max_steps=0, batch_size=8))
    printed = capsys.readouterr().out
    assert f"[PPL] finetune_start={record.measured['perplexity_before']:.4f}" in printed
    assert [line for line in printed.splitlines() if line.startswith("[PPL] epoch=2 eval_ppl=")]
    stats = json.loads((tmp_path / "out" / "distill_stats.json").read_text())
    assert stats["sparse_integrity_check"]["passed"]
    assert len(stats["details"]["epochs"]) == 2
    assert len(stats["details"]["steps"]) == record.measured["steps"]
    history = read_history(tmp_path / "out")
    assert [step["stage"] for step in history["steps"]] == ["prune", "distill"]
    # what prune measured on the same text is not measured again
    assert record.measured["perplexity_before"] == history["steps"][0]["measured"]["perplexity"]
    assert record.measured["perplexity"] < record.measured["perplexity_before"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert integrity(weights, load_mask(pruned / "pruned"))["passed"]


def test_another_evaluation_text_is_measured_anew(pruned, corpus, tmp_path):
    record = run(settings(pruned, corpus, tmp_path / "out", max_steps=1, eval_blocks=3))
    known = read_history(pruned / "pruned")["steps"][-1]["measured"]["perplexity"]
    assert record.measured["perplexity_before"] != known


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "eval_blocks": 3}, {"eval_blocks": 3}])
def test_perplexity_is_measured_alike_before_and_after(pruned, corpus, tmp_path, changes):
    """With a learning rate at which no weight changes, both are equal; prune has measured four blocks in float32."""
    record = run(settings(pruned, corpus, tmp_path / "out", max_steps=1, learning_rate=1e-30, **changes))
    assert record.measured["perplexity_before"] == record.measured["perplexity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_student_that_is_not_zero_under_its_mask_is_refused(pruned, corpus, tmp_path):
    config = settings(pruned, corpus, tmp_path / "out", student_model=str(pruned / "dense"))
    with pytest.raises(SparsityError, match="zero outside its mask"):
        run(config)


def test_the_older_mask_form_works(pruned, corpus, tmp_path):
    old = tmp_path / "sparsity_mask.pt"
    torch.save(dict(load_mask(pruned / "pruned").tensors), old)
    record = run(settings(pruned, corpus, tmp_path / "out", mask_file=str(old), max_steps=1, skip_ppl_eval=True))
    assert record.sparse_integrity_check["passed"]


def test_too_few_blocks_for_a_step(pruned, corpus, tmp_path):
    with pytest.raises(ValueError, match="train_data must have at least the 800 blocks of an optimizer step"):
        trainer(pruned, corpus, tmp_path, batch_size=100, grad_accum_steps=8)
