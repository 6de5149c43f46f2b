"""Damping and factors of Hessians that are singular, lopsided or damaged, and exact counts of weights to keep."""

import pytest
import torch

from components.core.mask.mask import pruned_count
from components.prune.calibration import hessians, observe
from components.prune.conditioning import inverse_factor
from components.prune.selection import keep_largest
from tests.conftest import VOCABULARY, tiny_model
from tests.unit.prune.layers import AWKWARD, awkward_layer, damp, error_of, inputs_with_a_sink, sparsegpt
from tests.walks import first_batches


@pytest.mark.parametrize("kind", AWKWARD)
def test_the_factor_is_that_of_the_damped_inverse(kind):
    _, hessian = awkward_layer(kind)
    found = inverse_factor(hessian, 0.01, "layer")
    damped = damp(hessian.double(), 0.01)
    torch.testing.assert_close(found.damped.double(), damped)
    damped.diagonal()[damped.diagonal() == 0] = 1
    scales = damped.diagonal().sqrt()
    upper = found.upper.double() * scales
    assert torch.equal(found.upper, found.upper.triu())
    identity = upper.T @ upper @ (damped / scales / scales[:, None])
    torch.testing.assert_close(identity, torch.eye(len(hessian), dtype=torch.float64), rtol=0, atol=1e-3)
    assert 1 <= found.condition <= 1.01 * float(torch.linalg.cond(damped))
    assert found.dead.nonzero()[:, 0].tolist() == ([3, 8] if kind == "dead inputs" else [])
    assert found.damping == 0.01


def test_without_trouble_the_factor_is_bit_for_bit_the_plain_one():
    _, hessian = awkward_layer("plain")
    damped = damp(hessian, 0.01)
    plain = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    assert torch.equal(inverse_factor(hessian, 0.01, "layer").upper, plain)


def test_damping_is_raised_where_the_hessian_needs_it(capsys):
    hessian = torch.eye(8) - 0.6 * torch.eye(8).roll(1, 0) - 0.6 * torch.eye(8).roll(-1, 0)  # eigenvalues from -0.2
    found = inverse_factor(hessian, 0.03, "my.layer")
    assert found.damping == 0.3
    assert "my.layer: the Hessian needed damping 0.3 instead of 0.03" in capsys.readouterr().out


def test_float64_is_used_where_float32_rounds_too_much(capsys):
    column = torch.arange(1.0, 9.0)
    found = inverse_factor(torch.outer(column, column), 1e-11, "my.layer")  # of rank 1, and without rounding itself
    assert found.damping == 1e-11
    assert found.condition > 1e9
    assert "damping 1e-11 and float64 instead of 1e-11" in capsys.readouterr().out


def test_inputs_that_hardly_vary_get_no_weights_that_rounding_to_8_bits_cannot_bear():
    """The last quarter of the inputs has a thousandth of the others' size, and repeats the first but for noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1000, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    inputs[:, 96:] = 1e-3 * (inputs[:, :32] + torch.randn(1000, 32, generator=generator))
    weight = torch.randn(32, 128, generator=generator)
    hessian = 2 / 1000 * inputs.T @ inputs
    errors = {}
    for name, damped in (("each entry", hessian + 0.01 * hessian.diagonal().diag()), ("ours", hessian)):
        ((found, _),) = sparsegpt([weight], damped, 0.7, damping=1e-9 if name == "each entry" else 0.01, block_size=32)
        step = found.abs().amax(1, keepdim=True) / 127
        errors[name] = [error_of(weight, each, hessian) for each in (found, (found / step).round() * step)]
    assert errors["ours"][1] < 1.01 * errors["ours"][0]
    assert errors["each entry"][1] > 5 * errors["ours"][1]


def damped_by_the_mean(hessian):
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))


def test_damping_is_not_drowned_by_a_sink():
    """Four tokens of a thousand have activations a thousand times as large in three inputs."""
    inputs = inputs_with_a_sink(1000, 128)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    ordinary = inputs[4:].T @ inputs[4:]
    hessian = 2 / 1000 * inputs.T @ inputs
    errors = {}
    for name, damped in (("by the mean", damped_by_the_mean(hessian)), ("ours", hessian)):
        ((found, _),) = sparsegpt([weight], damped, 0.7, damping=1e-9 if name == "by the mean" else 0.01)
        errors[name] = error_of(weight, found, ordinary)
    assert errors["ours"] < 0.8 * errors["by the mean"]


@torch.no_grad()
def model_with_a_sink(strength: float):
    """A model in which the first token of a block gives three inputs of the first down projection `strength`² times its size.

    Its other words lie in four dimensions, so that what is kept can make up for what is removed.
    """
    model = tiny_model("llama", vocab_size=VOCABULARY + 1)
    generator = torch.Generator().manual_seed(5)
    words, block = model.get_input_embeddings().weight, model.model.layers[0]
    words.copy_(torch.randn(len(words), 4, generator=generator) @ torch.randn(4, words.shape[1], generator=generator))
    words[:, 0] = 0
    words[VOCABULARY] = 10 * torch.eye(words.shape[1])[0]  # in a dimension of its own, which attention does not write to
    block.self_attn.o_proj.weight[0] = 0
    for projection in (block.mlp.gate_proj, block.mlp.up_proj):
        projection.weight[[3, 17, 40], 0] = strength
    return model


def text_behind_the_first_token(rows: int, seed: int) -> torch.Tensor:
    text = torch.randint(VOCABULARY, (rows, 63), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(text, (1, 0), value=VOCABULARY)


@torch.no_grad()
def test_a_sink_at_the_first_token_costs_the_text_less_than_with_damping_by_the_mean():
    divergence = {}
    for strength in (0.0, 12.0):
        model, held_out = model_with_a_sink(strength), text_behind_the_first_token(4, seed=2)
        block, batches = model.model.layers[0], first_batches(model, text_behind_the_first_token(16, seed=1))
        (group,) = hessians(block, observe(block, batches, ["mlp.down_proj"]), "block")
        diagonal = group.hessian.diagonal()
        assert (diagonal.mean() > 1000 * diagonal.median()) == bool(strength)
        weight = block.mlp.down_proj.weight.data
        dense, wanted = weight.clone(), model(input_ids=held_out).logits[:, 1:].log_softmax(-1)
        for name, hessian in (("by the mean", damped_by_the_mean(group.hessian)), ("ours", group.hessian)):
            ((pruned, _),) = sparsegpt([dense], hessian, 0.7, damping=0.01 if name == "ours" else 1e-9)
            weight.copy_(pruned)
            found = model(input_ids=held_out).logits[:, 1:].log_softmax(-1)
            divergence[strength, name] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert divergence[12.0, "ours"] < 0.6 * divergence[12.0, "by the mean"]
    assert divergence[0.0, "ours"] == pytest.approx(divergence[0.0, "by the mean"], rel=0.25)  # without a sink


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3333, 0.7, 0.999])
@pytest.mark.parametrize("shape", [(7, 13), (1, 16), (16, 1)])
def test_exactly_as_many_are_kept_as_asked_for(shape, sparsity):
    generator = torch.Generator().manual_seed(0)
    for scores in (
        torch.rand(shape, generator=generator),
        torch.randint(3, shape, generator=generator).float(),
        torch.ones(shape),
    ):
        kept = keep_largest(scores, sparsity, None)
        order = sorted(range(scores.numel()), key=lambda place: (float(scores.flatten()[place]), place))
        removed = order[: pruned_count(sparsity, scores.numel())]
        assert (~kept.flatten()).nonzero()[:, 0].tolist() == sorted(removed)


@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_are_kept_of_each_group(n_of_m):
    scores = torch.rand(5, 32, generator=torch.Generator().manual_seed(0))
    kept = keep_largest(scores, 1 - n_of_m[0] / n_of_m[1], n_of_m)
    for group, flags in zip(scores.view(-1, n_of_m[1]), kept.view(-1, n_of_m[1]), strict=True):
        assert set(flags.nonzero()[:, 0].tolist()) == set(group.argsort()[-n_of_m[0] :].tolist())
    assert (keep_largest(torch.ones(5, 32), 0.5, n_of_m).view(-1, n_of_m[1]).sum(1) == n_of_m[0]).all()
