"""Options of a run: teacher cache, keeping the best epoch, early stopping, mixed text, a dense control, TensorBoard."""

import json
import shutil

import pytest
import torch

from components.core.mask.mask import load_mask
from components.core.perplexity import decoder_and_head
from components.distill.cache import Cache, cache_name
from components.distill.stage import run, training_blocks
from components.distill.teacher import Teacher, compute_states
from tests.conftest import save_tiny, tiny_model, tiny_tokenizer
from tests.unit.distill.test_distill import pruned, settings, trainer  # noqa: F401 (a fixture)


@pytest.mark.parametrize(("max_steps", "blocks"), [(0, 40), (3, 12)])
def test_with_the_cache_the_teacher_runs_before_training(pruned, corpus, tmp_path, max_steps, blocks):  # noqa: F811
    """On the blocks that the run will see."""
    cache = Cache(tmp_path / "cache", (40, 32, 64))
    run = trainer(pruned, corpus, tmp_path, cache=cache, epochs=3, max_steps=max_steps)
    assert run.teacher.decoder is None
    assert int(cache.known.sum()) == blocks
    assert len(run.fit().steps) == (max_steps or 30)


def test_the_cache_changes_no_loss_beyond_its_rounding(pruned, corpus, tmp_path):  # noqa: F811
    plain = trainer(pruned, corpus, tmp_path, epochs=2, max_steps=0).fit()
    cached = trainer(pruned, corpus, tmp_path, cache=Cache(tmp_path / "cache", (40, 32, 64)), epochs=2, max_steps=0).fit()
    for left, right in zip(plain.steps, cached.steps, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=2e-3)


def test_a_teacher_with_a_cache_gives_the_same_states_each_time_and_another_process_uses_them(tmp_path, monkeypatch):
    folder, cpu = save_tiny(tmp_path / "dense", "qwen3", tied=True), torch.device("cpu")
    blocks, rows = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1])

    def teacher(cache):
        head = compute_states(folder, blocks, torch.arange(5), cache, torch.float32, cpu, False)
        return Teacher(blocks, head, None, cache)

    cache = Cache(tmp_path / "cache", (5, 16, 64))
    (first,) = teacher(cache).hidden(rows)
    decoder, head = decoder_and_head(tiny_model("qwen3", tied=True))
    assert torch.equal(first, Teacher(blocks, head, decoder, None).hidden(rows)[-1].to(torch.bfloat16).float())
    monkeypatch.setattr("components.core.walk.walk.Walk.advance", lambda *_: 1 / 0)
    assert torch.equal(teacher(Cache(tmp_path / "cache", (5, 16, 64))).hidden(rows)[0], first)
    cache.remove()
    assert not (tmp_path / "cache").exists()


def test_a_cache_is_used_again_only_for_the_same_states(tmp_path):
    blocks = torch.arange(64).view(4, 16)
    folders = [save_tiny(tmp_path / name, seed=seed) for name, seed in (("same", 0), ("again", 0), ("seed", 1), ("config", 0))]
    settings = json.loads((folders[3] / "config.json").read_text())
    (folders[3] / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    cpu, plain = torch.device("cpu"), torch.float32
    name = cache_name(folders[0], blocks, plain, cpu)
    assert cache_name(folders[1], blocks.clone(), plain, cpu) == name
    others = [
        cache_name(folders[0], blocks.view(8, 8), plain, cpu),  # the same bytes
        cache_name(folders[0], blocks.flip(0), plain, cpu),
        cache_name(folders[0], blocks, torch.bfloat16, cpu),
        cache_name(folders[0], blocks, plain, torch.device("cuda")),
        cache_name(folders[2], blocks, plain, cpu),
        cache_name(folders[3], blocks, plain, cpu),
    ]
    assert len({name, *others}) == 7


def test_the_stage_leaves_no_cache_behind(pruned, corpus, tmp_path):  # noqa: F811
    run(settings(pruned, corpus, tmp_path / "out", teacher_cache="always", max_steps=2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_best_evaluation_is_kept_and_patience_ends_a_run(pruned, corpus, tmp_path):  # noqa: F811
    """A learning rate that destroys the model after some epochs: the first epochs are the best."""
    changes = {"learning_rate": 0.3, "epochs": 6, "max_steps": 0, "batch_size": 8, "warmup_ratio": 1.0, "max_grad_norm": 1e9}
    record = run(settings(pruned, corpus, tmp_path / "out", keep_best=True, patience=2, **changes))
    epochs = [entry["eval_ppl"] for entry in record.details["epochs"]]
    best = epochs.index(min(epochs)) + 1
    assert len(epochs) == min(best + 2, 6)
    assert record.measured["perplexity"] == min(epochs)


def test_the_saved_weights_are_those_of_the_best_epoch(pruned, corpus, tmp_path):  # noqa: F811
    from components.evaluate.config import EvaluateConfig
    from components.evaluate.stage import run as evaluate

    changes = {"learning_rate": 0.3, "epochs": 4, "max_steps": 0, "batch_size": 8, "warmup_ratio": 1.0, "max_grad_norm": 1e9}
    record = run(settings(pruned, corpus, tmp_path / "out", keep_best=True, **changes))
    assert record.details["epochs"][-1]["eval_ppl"] > record.measured["perplexity"]  # the last is not the best
    found = evaluate(EvaluateConfig(model_dir=str(tmp_path / "out"), eval_data=str(corpus), eval_blocks=4, eval_seq_len=32))
    assert found.measured["perplexity"] == pytest.approx(record.measured["perplexity"], rel=1e-5)


def test_mixed_text_has_its_share(pruned, corpus, tmp_path):  # noqa: F811
    second = tmp_path / "second.txt"
    second.write_text("Z" * 32 * 1000)
    config = settings(pruned, corpus, tmp_path / "out", mix_data=str(second), mix_ratio=0.25)
    blocks = training_blocks(config, tiny_tokenizer())
    from_second = (blocks == blocks[-1, 0]).all(1).float().mean()
    assert from_second == pytest.approx(0.25, abs=0.01)


def test_the_dense_control_trains_the_same_layers_without_zeros(pruned, corpus, tmp_path):  # noqa: F811
    config = settings(pruned, corpus, tmp_path / "out", student_model=str(pruned / "dense"), no_mask=True, max_steps=3)
    record = run(config)
    assert record.measured["sparsity"] == 0
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (pruned / "dense", tmp_path / "out"))
    trained = load_mask(pruned / "pruned").tensors
    for name, value in after.items():
        assert torch.equal(value, before[name]) is (name not in trained), name


def test_missing_tensorboard_is_told_before_the_work(pruned, corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^tensorboard_dir needs its package: pip install 'sparse-distill\[tensorboard\]'$"):
        settings(pruned, corpus, tmp_path / "out", tensorboard_dir=str(tmp_path / "board")).check_environment()


def test_a_failure_of_tensorboard_does_not_cost_the_student(pruned, corpus, tmp_path, monkeypatch):  # noqa: F811
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("components.distill.stage.write_tensorboard", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(OSError, match="^no space left on device$"):
        run(settings(pruned, corpus, tmp_path / "out", tensorboard_dir=str(tmp_path / "board"), max_steps=1))
    assert (tmp_path / "out" / "distill_stats.json").is_file()


def test_tensorboard_files_hold_the_curves(pruned, corpus, tmp_path):  # noqa: F811
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = run(settings(pruned, corpus, tmp_path / "out", tensorboard_dir=str(tmp_path / "board"), max_steps=3))
    events = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    assert found == pytest.approx([step["loss"] for step in record.details["steps"]])


def test_gradient_checkpointing_changes_nothing(pruned, corpus, tmp_path):  # noqa: F811
    losses = [
        [step["loss"] for step in trainer(pruned, corpus, tmp_path, max_steps=3, gradient_checkpointing=on).fit().steps]
        for on in (False, True)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_trains_with_exact_zeros(pruned, corpus, tmp_path, dtype):  # noqa: F811
    record = run(settings(pruned, corpus, tmp_path / "out", dtype=dtype, max_steps=10))
    assert record.sparse_integrity_check["violations"] == 0
    assert record.measured["perplexity"] < record.measured["perplexity_before"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_teacher_and_student_need_the_same_vocabulary(pruned, corpus, tmp_path):  # noqa: F811
    from transformers import AutoModelForCausalLM, Qwen3Config

    from tests.conftest import SMALL

    other = save_tiny(tmp_path / "other", "qwen3")
    AutoModelForCausalLM.from_config(Qwen3Config(**(SMALL | {"vocab_size": 300}))).save_pretrained(other)
    with pytest.raises(ValueError, match=r"teacher_model must have the student's vocabulary of 256 words, got 300"):
        run(settings(pruned, corpus, tmp_path / "out", teacher_model=str(other)))


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_term_on_hidden_states_is_the_mean_over_blocks_and_tokens(pruned, corpus, tmp_path, epochs):  # noqa: F811
    plain = trainer(pruned, corpus, tmp_path, max_steps=1)
    run = trainer(pruned, corpus, tmp_path, max_steps=1, alpha_hidden=0.5, epochs=epochs)
    assert not run.config.caches_teacher()
    rows = torch.tensor([3, 1])
    both = [
        model(input_ids=run.blocks[rows], use_cache=False, output_hidden_states=True)
        for model in (run.backend.decoder, run.teacher.decoder)
    ]
    states = [(*output.hidden_states[1:-1], output.last_hidden_state) for output in both]
    assert len(states[0]) == len(run.backend.decoder.layers) > 1
    errors = [
        float((student - teacher).norm() ** 2 / teacher.norm() ** 2)
        for pair in zip(*states, strict=True)
        for student, teacher in zip(*(each.detach().flatten(0, 1) for each in pair), strict=True)
    ]
    found = run.losses(rows)
    assert found["hidden_loss"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    without = plain.losses(rows)
    assert list(without) == ["loss", "kd_loss", "ce_loss"]
    assert found["loss"].item() == pytest.approx(without["loss"].item() + 0.5 * found["hidden_loss"].item())
    found["loss"].backward()
    without["loss"].backward()
    name = "layers.0.mlp.up_proj.weight"
    gradients = [each.backend.decoder.get_parameter(name).grad for each in (run, plain)]
    assert not torch.allclose(*gradients)


def test_the_term_on_hidden_states_falls_in_training(pruned, corpus, tmp_path):  # noqa: F811
    steps = trainer(pruned, corpus, tmp_path, alpha_hidden=1.0, learning_rate=1e-2, epochs=2, max_steps=0).fit().steps
    assert steps[-1]["hidden_loss"] < 0.8 * steps[0]["hidden_loss"]


def test_hidden_states_of_models_of_different_shape_are_not_compared(pruned, corpus, tmp_path):  # noqa: F811
    shutil.copytree(pruned / "dense", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    model = tiny_model("qwen3", tied=True, num_hidden_layers=config["num_hidden_layers"] + 1)
    model.save_pretrained(tmp_path / "teacher")
    config = settings(pruned, corpus, tmp_path / "out", teacher_model=str(tmp_path / "teacher"), alpha_hidden=1.0)
    with pytest.raises(ValueError, match=r"^alpha_hidden must be 0 for a teacher of 3 blocks of width 64 and a student of 2 "):
        run(config)
