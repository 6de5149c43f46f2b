"""ADMM: it follows its equations, the result has exactly the counts of the mask that is given, and a killed run resumes."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from components.core.checkpoint.loading import open_model
from components.core.history import read_history
from components.core.mask.file import MASK_FILE, find_mask, fingerprint_of_file
from components.core.mask.integrity import SparsityError, integrity
from components.core.mask.mask import Mask, load_mask, save_mask
from components.distill.admm import Admm, counts_of
from components.distill.backends import SingleProcess
from components.distill.config import DistillConfig
from components.distill.loop import Trainer, plan, rows_used
from components.distill.schedule import BETAS
from components.distill.stage import run, start_dense
from components.distill.teacher import make_teacher
from components.evaluate.config import EvaluateConfig
from components.evaluate.stage import run as evaluate
from components.prune.config import PruneConfig
from components.prune.stage import run as prune
from tests.conftest import save_tiny
from tests.unit.distill.test_backends import checkpointed, finished, folder, losses, start, stop_after_a_checkpoint, two  # noqa: F401
from tests.unit.distill.test_distill import curve, pruned, settings  # noqa: F401 (a fixture)

ADMM = {"mask": "admm", "admm_interval": 3, "admm_penalty": 0.1}
FLAGS = ("--mask=admm", "--admm_interval=4", "--admm_penalty=0.1")


@pytest.fixture(autouse=True)
def usual_handler():
    """Training with checkpoints leaves its handler of SIGTERM behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def same(full, _):
    return full


def admm_for(model, mask, penalty=0.1, learning_rate=0.01, weight_decay=0.0):
    parameters = {name: value for name, value in model.named_parameters() if name in mask.tensors}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=learning_rate, betas=BETAS, weight_decay=weight_decay, eps=1e-8, fused=True
    )
    return Admm(parameters, optimizer, counts_of(mask, model), mask, penalty, same, same), optimizer


def best_of(scores, count):
    """The places of the largest of some scores, by sorting."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [index in order[:count] for index in range(len(scores))]


def steps_by_hand(x, kept, gradient, choose, penalty, rate, decay, interval, steps):
    """x, z, u and the places of z after some steps, number by number."""
    count = len(x)
    z, u, m, v = [x[i] if kept[i] else 0.0 for i in range(count)], [0.0] * count, [0.0] * count, [0.0] * count
    for step in range(1, steps + 1):
        slope = gradient(x)
        for i in range(count):
            g = slope[i] + penalty * (x[i] - z[i] + u[i])
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            unbiased = m[i] / (1 - BETAS[0] ** step), v[i] / (1 - BETAS[1] ** step)
            x[i] -= rate * decay * x[i]
            x[i] -= rate * unbiased[0] / (unbiased[1] ** 0.5 + 1e-8)
        if step % interval == 0:
            kept = choose([v[i] * (x[i] + u[i]) ** 2 for i in range(count)])
            for i in range(count):
                z[i] = x[i] + u[i] if kept[i] else 0.0
                u[i] = u[i] + x[i] - z[i]
    return x, z, u, choose([v[i] * x[i] ** 2 for i in range(count)]), kept


@pytest.mark.parametrize("pattern", ["unstructured", "1:3"])
def test_it_follows_the_equations(pattern):
    """Against Adam and ADMM in plain Python, over several changes of the mask."""
    torch.manual_seed(3)
    layer = nn.Linear(6, 4, bias=False)
    model = nn.ModuleDict({"layer": layer})
    inputs, wanted = torch.randn(16, 6), torch.randn(16, 4)
    given = torch.zeros(4, 6, dtype=torch.bool)
    if pattern == "1:3":
        given[:, ::3] = True
    else:
        given.view(-1)[:7] = True
    mask = Mask({"layer.weight": given}, pattern)
    how = {"penalty": 0.3, "rate": 0.05, "decay": 0.1}

    def slope(x):
        weight = torch.tensor(x, dtype=torch.float64).view(4, 6).requires_grad_()
        (inputs.double() @ weight.T - wanted).square().mean().backward()
        return weight.grad.flatten().tolist()

    def choose(scores):
        if pattern == "unstructured":
            return best_of(scores, 7)
        return [place for at in range(0, 24, 3) for place in best_of(scores[at : at + 3], 1)]

    first = [float(value) for value in layer.weight.detach().flatten()]
    x, z, u, last, kept = steps_by_hand(list(first), given.flatten().tolist(), slope, choose, **how, interval=3, steps=20)
    assert kept != given.flatten().tolist()  # the mask has changed

    admm, optimizer = admm_for(model, mask, how["penalty"], how["rate"], how["decay"])
    for step in range(1, 21):
        (layer(inputs) - wanted).square().mean().backward()
        admm.pull()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            sums = admm.update()
    target, places = admm.target["layer.weight"], admm.kept["layer.weight"]
    none = torch.zeros(())
    for found, expected in ((layer.weight, x), (torch.where(places, target, none), z), (torch.where(places, none, -target), u)):
        torch.testing.assert_close(found.detach().flatten(), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert places.flatten().tolist() == kept
    assert sums[1] == given.sum()
    with admm.projected():
        assert (layer.weight != 0).flatten().tolist() == last
        assert torch.equal(admm.support({"layer.weight": layer.weight.detach()})["layer.weight"], layer.weight != 0)
    torch.testing.assert_close(layer.weight.detach().flatten(), torch.tensor(x), rtol=1e-4, atol=1e-5)
    admm.project()
    torch.testing.assert_close(layer.weight.detach().flatten(), torch.tensor(x) * torch.tensor(last), rtol=1e-4, atol=1e-5)


class Experts(nn.Module):
    """Experts as transformers stores them, in one parameter, [experts, in, out]."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 2))


def test_each_matrix_has_its_own_count_however_it_is_stored():
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(4, 2), "turned": Conv1D(2, 4), "experts": Experts()})
    turned = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0]], dtype=torch.bool)  # [in, out]
    experts = torch.stack([turned, ~turned, torch.ones_like(turned)])
    mask = Mask({"turned.weight": turned, "experts.up": experts})
    assert [[count for _, count in counts] for counts in counts_of(mask, model).values()] == [[2], [2, 6, 8]]
    admm, _ = admm_for(model, mask)
    admm.update()
    admm.project()
    assert int((model["turned"].weight != 0).sum()) == 2
    assert (model["experts"].up != 0).sum((1, 2)).tolist() == [2, 6, 8]
    assert (model["linear"].weight != 0).all()  # has no mask
    for matrix in (*model["experts"].up.detach(), model["turned"].weight.detach()):  # without gradients, by magnitude
        assert matrix[matrix != 0].abs().min() > 0
    # 1 of every 2 inputs, which lie in columns
    halves = Mask({"turned.weight": torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=torch.bool)}, "1:2")
    assert [[count for _, count in counts] for counts in counts_of(halves, model).values()] == [[4]]
    admm, _ = admm_for(model, halves)
    model["turned"].weight.data = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 5.0], [2.0, 4.0]])
    admm.project()
    assert model["turned"].weight.tolist() == [[0, 2], [3, 0], [0, 5], [2, 0]]
    with pytest.raises(ValueError, match=r"mask_file must keep 1:2 weights for mask admm, turned\.weight does not"):
        counts_of(Mask({"turned.weight": turned}, "1:2"), model)


def test_what_no_gradient_has_reached_is_ranked_by_magnitude_and_the_penalty_reaches_all():
    model = nn.ModuleDict({"layer": nn.Linear(3, 1, bias=False)})
    model["layer"].weight.data = torch.tensor([[1.0, -3.0, 2.0]])
    admm, _ = admm_for(model, Mask({"layer.weight": torch.tensor([[True, False, False]])}))
    admm.pull()  # although there is no gradient
    assert model["layer"].weight.grad.tolist() == [[0, pytest.approx(-0.3), pytest.approx(0.2)]]
    new, kept, apart, size = admm.update().tolist()
    assert (new, kept, apart, size) == (1, 1, 5, 14)
    assert admm.kept["layer.weight"].tolist() == [[False, True, False]]
    assert admm.target["layer.weight"].tolist() == [[-1, -3, -2]]


def trainer(folder, corpus, tmp_path, **changes) -> Trainer:  # noqa: F811
    """As that of `test_distill`, with ADMM."""
    config = settings(folder, corpus, tmp_path / "out", **(ADMM | changes))
    cpu = torch.device("cpu")
    student, weights = open_model(config.student_model, torch.float32, cpu)
    blocks = torch.randint(256, (40, 32), generator=torch.Generator().manual_seed(1))
    mask = load_mask(config.mask_file)
    backend = SingleProcess(config, cpu, torch.float32)
    teacher = make_teacher(
        Path(config.teacher_model), blocks, rows_used(len(blocks), config, 1), None, backend, torch.float32, False
    )
    backend.prepare(student, weights, mask, plan(len(blocks), config, 1)[1])
    start_dense(config, backend, Path(config.teacher_model))
    backend.constrain(mask)
    return Trainer(backend, teacher, blocks, blocks[:4], config, {"mask": mask.fingerprint()})


def test_training_starts_from_the_dense_weights(pruned, corpus, tmp_path):  # noqa: F811
    made = trainer(pruned, corpus, tmp_path)
    dense = load_file(pruned / "dense" / "model.safetensors")
    given = load_mask(pruned / "pruned").tensors
    for name, parameter in made.backend.parameters.items():
        assert torch.equal(parameter.detach(), dense[name])
        assert torch.equal(made.backend.admm.target[name], dense[name] * given[name])


def test_the_weights_come_closer_to_those_that_are_kept(pruned, corpus, tmp_path, capsys):  # noqa: F811
    made = trainer(pruned, corpus, tmp_path, epochs=20, max_steps=0, learning_rate=5e-3, admm_interval=16)
    entries = [entry for entry in made.fit().steps if "distance" in entry]
    assert [entry["step"] for entry in entries] == list(range(16, 201, 16))
    assert entries[-1]["distance"] < 0.3 * entries[0]["distance"]
    assert 0 < entries[-1]["mask_changed"] < 0.5 * entries[0]["mask_changed"] < 0.5
    said = f"mask after step 16: {entries[0]['mask_changed']:.2%} of what it keeps has changed; distance of the weights "
    assert f"{said}{entries[0]['distance']:.4f}\n" in capsys.readouterr().out


def test_the_result_has_the_counts_and_its_own_mask(pruned, corpus, tmp_path):  # noqa: F811
    """And the perplexities are those of the weights that are saved."""
    out = tmp_path / "out"
    record = run(settings(pruned, corpus, out, **ADMM, epochs=2, max_steps=0, batch_size=8))
    given, mask = load_mask(pruned / "pruned"), load_mask(out)
    weights, dense = load_file(out / "model.safetensors"), load_file(pruned / "dense" / "model.safetensors")
    shared = total = 0
    for name, kept in given.tensors.items():
        assert int(mask.tensors[name].sum()) == int(kept.sum()), name
        assert int((weights[name] != 0).sum()) == int(kept.sum()), name
        assert torch.equal(weights[name] != 0, mask.tensors[name]), name
        shared, total = shared + int((kept & mask.tensors[name]).sum()), total + int(kept.sum())
    assert all(torch.equal(value, dense[name]) for name, value in weights.items() if name not in given.tensors)
    assert integrity(weights, mask)["passed"]
    assert record.sparse_integrity_check == integrity(weights, mask)
    assert record.measured["sparsity"] == given.realised_sparsity() == mask.realised_sparsity()
    assert mask.sparsity == given.sparsity
    assert record.measured["mask_overlap"] == shared / total < 1
    assert record.details["inputs"]["mask"] == given.fingerprint()
    (*_, step) = read_history(out)["steps"]
    assert step["measured"]["mask"] == mask.fingerprint() == fingerprint_of_file(out / MASK_FILE) != given.fingerprint()
    found = evaluate(EvaluateConfig(model_dir=str(out), eval_data=str(corpus), eval_blocks=4, eval_seq_len=32))
    assert record.details["epochs"][-1]["eval_ppl"] == pytest.approx(found.measured["perplexity"], rel=1e-5)
    assert record.measured["perplexity"] == pytest.approx(found.measured["perplexity"], rel=1e-5)
    # what the pruned model measured, which is where a fixed mask would start
    assert record.measured["perplexity_before"] == read_history(pruned / "pruned")["steps"][-1]["measured"]["perplexity"]


def test_without_the_projection_the_check_fails(pruned, corpus, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Admm, "project", lambda _: None)
    with pytest.raises(SparsityError, match="zero outside its mask"):
        run(settings(pruned, corpus, tmp_path / "out", **ADMM, max_steps=4))
    assert not list(tmp_path.iterdir())


def test_the_best_epoch_is_kept_with_its_mask(pruned, corpus, tmp_path):  # noqa: F811
    """A learning rate that destroys the model after some epochs."""
    changes = {"learning_rate": 0.05, "epochs": 4, "max_steps": 0, "batch_size": 8, "warmup_ratio": 1.0}
    record = run(settings(pruned, corpus, tmp_path / "out", **ADMM, keep_best=True, patience=1, **changes))
    epochs = [entry["eval_ppl"] for entry in record.details["epochs"]]
    assert epochs[-1] > min(epochs)
    assert record.measured["perplexity"] == pytest.approx(min(epochs), rel=1e-5)
    weights, mask = load_file(tmp_path / "out" / "model.safetensors"), load_mask(tmp_path / "out")
    assert all(torch.equal(weights[name] != 0, kept) for name, kept in mask.tensors.items())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_pattern_is_kept(corpus, tmp_path, dtype):
    save_tiny(tmp_path / "dense", "qwen3", tied=True)
    prune(
        PruneConfig(
            dense_model=str(tmp_path / "dense"),
            output_dir=str(tmp_path / "pruned"),
            calibration_data=str(corpus),
            sparsity=0.5,
            pattern="2:4",
            nsamples=8,
            seq_len=32,
            skip_ppl_eval=True,
        )
    )
    mask_file = tmp_path / "elsewhere" / "new.safetensors"
    run(settings(tmp_path, corpus, tmp_path / "out", **ADMM, dtype=dtype, output_mask_file=str(mask_file)))
    assert not (tmp_path / "out" / MASK_FILE).exists()
    mask = load_mask(mask_file)
    assert mask.pattern == "2:4"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, kept in mask.tensors.items():
        assert (kept.view(-1, 4).sum(1) == 2).all()
        assert (weights[name][~kept] == 0).all()
    assert mask.fingerprint() != load_mask(tmp_path / "pruned").fingerprint()


def test_a_fixed_mask_is_written_as_it_was_given(pruned, corpus, tmp_path):  # noqa: F811
    """Where it is asked for, and that of the older form in the new form."""
    old = tmp_path / "sparsity_mask.pt"
    torch.save(dict(load_mask(pruned / "pruned").tensors), old)
    given = fingerprint_of_file(find_mask(pruned / "pruned"))
    plain = {"max_steps": 1, "skip_ppl_eval": True}
    first = run(settings(pruned, corpus, tmp_path / "first", **plain))
    second = run(settings(pruned, corpus, tmp_path / "second", **plain, mask_file=str(old)))
    assert (tmp_path / "first" / MASK_FILE).read_bytes() == (pruned / "pruned" / MASK_FILE).read_bytes()
    assert fingerprint_of_file(tmp_path / "second" / MASK_FILE) == given
    assert first.measured["mask"] == second.measured["mask"] == first.details["inputs"]["mask"] == given
    assert "mask_overlap" not in first.measured


@pytest.mark.parametrize("best", [False, True])
def test_training_resumes_bit_for_bit(pruned, corpus, tmp_path, best):  # noqa: F811
    """From a checkpoint between two changes of the mask."""
    plain = {"max_steps": 14, "checkpoint_steps": 5, "keep_checkpoints": 9, "keep_best": best, "admm_interval": 4}
    plain["checkpoint_dir"] = str(tmp_path / "checkpoints")
    whole = trainer(pruned, corpus, tmp_path, **plain)
    whole.fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000005"]
    again = trainer(pruned, corpus, tmp_path, **plain)
    again.fit()
    assert curve(again.progress) == curve(whole.progress)
    states = [(made.backend.admm.state(), dict(made.backend.parameters)) for made in (whole, again)]
    for wanted, found in zip(*states, strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def masks(folder, names):  # noqa: F811
    return [load_mask(folder / name).tensors for name in names]


def test_fsdp_is_like_one_process_and_a_killed_run_ends_bit_for_bit(folder, corpus):  # noqa: F811
    finished(start(folder, corpus, "admm-one", "--batch_size=4", *FLAGS))
    how = (*two("fsdp", port=29670), *FLAGS)
    printed = finished(start(folder, corpus, "admm-two", *how))
    assert printed.count("mask after step 4: ") == 1
    assert losses(folder, "admm-two") == pytest.approx(losses(folder, "admm-one"), rel=1e-3)
    one, other = (load_file(folder / name / "model.safetensors") for name in ("admm-one", "admm-two"))
    kept = masks(folder, ("admm-one", "admm-two"))
    for name, value in one.items():
        both = kept[0][name] & kept[1][name] if name in kept[0] else torch.ones_like(value, dtype=torch.bool)
        assert both.sum() >= 0.99 * (kept[0][name].sum() if name in kept[0] else value.numel())
        torch.testing.assert_close(other[name][both], value[both], rtol=1e-2, atol=1e-3)
    code = stop_after_a_checkpoint(start(folder, corpus, "admm-kill", *how, *checkpointed(folder, "admm-kill")), signal.SIGKILL)
    assert code == -9
    assert "resuming from" in finished(start(folder, corpus, "admm-kill", *how, *checkpointed(folder, "admm-kill")))
    assert losses(folder, "admm-kill") == losses(folder, "admm-two")
    again = load_file(folder / "admm-kill" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in other.items())
    assert (folder / "admm-kill" / MASK_FILE).read_bytes() == (folder / "admm-two" / MASK_FILE).read_bytes()


def test_another_number_of_processes_goes_on_with_the_same_variables(folder, corpus):  # noqa: F811
    more = checkpointed(folder, "admm-reshard")
    stop_after_a_checkpoint(start(folder, corpus, "admm-reshard", *two("fsdp", port=29675), *FLAGS, *more), signal.SIGKILL)
    one = ("--backend=fsdp", "--launcher=torchrun", "--batch_size=4", "--master_port=29676")
    assert "resuming from" in finished(start(folder, corpus, "admm-reshard", *one, *FLAGS, *more))
    finished(start(folder, corpus, "admm-whole", "--batch_size=4", *FLAGS))
    assert losses(folder, "admm-reshard") == pytest.approx(losses(folder, "admm-whole"), rel=1e-3)
    whole, found = masks(folder, ("admm-whole", "admm-reshard"))
    shared = sum(int((kept & found[name]).sum()) for name, kept in whole.items())
    assert shared > 0.99 * sum(int(kept.sum()) for kept in whole.values())


def test_what_does_not_fit_is_refused_in_one_line(pruned, corpus, tmp_path, monkeypatch):  # noqa: F811
    for changes, message in (
        ({"mask": "free"}, "mask must be one of fixed, admm, got 'free'"),
        ({"no_mask": True}, "mask must be fixed for no_mask, got admm"),
        ({"backend": "deepspeed"}, "backend must be none or fsdp for mask admm, got deepspeed: its engine takes the steps"),
        ({"admm_penalty": 0.0}, "admm_penalty must be above 0"),
        ({"admm_interval": 0}, "admm_interval must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(pruned, corpus, tmp_path / "out", **ADMM | changes)
    inside = settings(pruned, corpus, tmp_path / "out", output_mask_file=str(tmp_path / "out" / "mask"))
    with pytest.raises(ValueError, match="output_mask_file must lie outside output_dir"):
        inside.check_environment()

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr("components.core.checkpoint.weights.Weights.load", read)
    wide = save_tiny(tmp_path / "wide", "qwen3", tied=True, intermediate_size=96)
    name = r"model\.layers\.\d\.mlp\.gate_proj\.weight"
    with pytest.raises(
        ValueError, match=rf"teacher_model must have the student's shapes for mask admm, {name} is \[96, 64\], not \[128,"
    ):
        run(settings(pruned, corpus, tmp_path / "out", **ADMM, teacher_model=str(wide)))
    mask = load_mask(pruned / "pruned")
    save_mask(Mask(dict(mask.tensors), "2:4", mask.sparsity), tmp_path / MASK_FILE)
    with pytest.raises(ValueError, match="mask_file must keep 2:4 weights for mask admm"):
        run(settings(pruned, corpus, tmp_path / "out", **ADMM, mask_file=str(tmp_path / MASK_FILE)))


def test_the_settings_are_part_of_what_a_run_is():
    """A checkpoint is resumed with the same ones alone."""
    from components.core.settings import affecting

    plain = {"teacher_model": "a", "student_model": "b", "mask_file": "c", "output_dir": "d"}
    found = affecting(DistillConfig(**plain, **ADMM))
    assert json.loads(json.dumps({name: found[name] for name in ADMM})) == ADMM
    assert "output_mask_file" not in found
