"""Reconstruction of a tiny block, compared with Adam written out."""

import math

import pytest
import torch

from components.core.blocks import find_blocks, matrices
from components.core.walk.stream import run_block
from components.prune.reconstruct import reconstruct
from tests.conftest import VOCABULARY
from tests.unit.prune.layers import magnitude
from tests.walks import first_batches


@pytest.fixture
def pruned(model, monkeypatch):
    """A block that has been pruned by magnitude: (block, examples, masks)."""
    monkeypatch.setattr("components.core.walk.stream.TOKENS_PER_FORWARD", 32)
    ids = torch.randint(VOCABULARY, (10, 16), generator=torch.Generator().manual_seed(3))
    batches = first_batches(model, ids)
    block = find_blocks("dense_model", model)[1][0]
    with torch.no_grad():
        examples = [(batch, run_block(block, batch)) for batch in batches]
        masks = {}
        for name in [matrix.parameter for matrix in matrices(block).values()]:
            ((weight, masks[name]),) = magnitude([block.get_parameter(name)], 0.7)
            block.get_parameter(name).copy_(weight)
    return block, lambda: iter(examples), masks


def loss_of(block, examples):
    """Mean over tokens of the relative error, in every fourth batch, in a loop over tokens."""
    losses = []
    with torch.no_grad():
        for batch, wanted in list(examples())[::4]:
            found = run_block(block, batch)
            pairs = zip(found.flatten(0, 1).double(), wanted.flatten(0, 1).double(), strict=True)
            errors = [float((one - other).square().sum() / other.square().sum()) for one, other in pairs]
            losses.append(sum(errors) / len(errors))
    return sum(losses) / len(losses)


def test_the_loss_falls_and_nothing_else_changes(pruned):
    block, examples, masks = pruned
    before, others = loss_of(block, examples), {name: value.clone() for name, value in block.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    found = reconstruct(block, examples, masks, epochs=10, learning_rate=0.05)
    assert found == pytest.approx((before, loss_of(block, examples)), rel=1e-4)
    assert found[1] < 0.8 * found[0]
    for name, value in block.state_dict().items():
        if name in masks:
            assert (value[~masks[name]] == 0).all()
            assert not torch.equal(value, others[name])
        else:
            assert torch.equal(value, others[name])
    assert {name: parameter.requires_grad for name, parameter in block.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in block.parameters())


def test_agrees_with_adam_written_out(pruned):
    block, examples, masks = pruned
    start = {name: value.clone() for name, value in block.state_dict().items()}
    epochs, rate = 3, 0.05
    reconstruct(block, examples, masks, epochs=epochs, learning_rate=rate)
    trained = {name: value.clone() for name, value in block.state_dict().items()}
    block.load_state_dict(start)
    block.requires_grad_(True)
    first, second = ({name: torch.zeros_like(start[name]) for name in masks} for _ in "12")
    steps = epochs * len(list(examples()))
    speeds = {name: rate * float(start[name][mask].square().mean().sqrt()) for name, mask in masks.items()}
    for step, (batch, wanted) in enumerate(pair for _ in range(epochs) for pair in examples()):
        block.zero_grad()
        found = run_block(block, batch)
        ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean().backward()
        for name, mask in masks.items():
            weight = block.get_parameter(name)
            gradient = torch.where(mask, weight.grad, 0.0)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            with torch.no_grad():
                weight -= speeds[name] * (1 + math.cos(math.pi * step / steps)) / 2 * mean / (square.sqrt() + 1e-8)
    for name in masks:
        torch.testing.assert_close(trained[name], block.get_parameter(name).detach(), rtol=1e-3, atol=1e-5)


def test_training_that_fails_leaves_the_weights_as_they_were(pruned):
    block, examples, masks = pruned
    start = {name: value.clone() for name, value in block.state_dict().items()}
    before, after = reconstruct(block, examples, masks, epochs=1, learning_rate=100)
    assert after == before
    assert all(torch.equal(value, start[name]) for name, value in block.state_dict().items())


def test_steps_too_small_for_bfloat16_add_up(pruned):
    """A step is smaller than what a weight in bfloat16 can change by; only the float32 copy sees it."""
    block, examples, masks = pruned
    block.bfloat16()
    start = {name: block.get_parameter(name).detach().clone() for name in masks}

    def rounded():
        for batch, wanted in examples():
            call = tuple(part.bfloat16() for part in batch.call[1]["position_embeddings"])
            named = batch.call[1] | {"position_embeddings": call}
            yield type(batch)(batch.rows, batch.hidden.bfloat16(), (batch.call[0], named)), wanted.bfloat16()

    before, after = reconstruct(block, rounded, masks, epochs=40, learning_rate=0.001)
    assert after < before
    assert any(not torch.equal(block.get_parameter(name), start[name]) for name in masks)
    assert all(block.get_parameter(name).dtype == torch.bfloat16 for name in masks)
    assert all((block.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())


def test_is_deterministic(pruned):
    block, examples, masks = pruned
    start = {name: value.clone() for name, value in block.state_dict().items()}
    results = []
    for _ in range(2):
        block.load_state_dict(start)
        with torch.no_grad():  # as where the model is walked through
            results.append(
                (reconstruct(block, examples, masks, epochs=2), {k: v.clone() for k, v in block.state_dict().items()})
            )
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in masks)


def test_an_expert_without_tokens_stays_as_it_was(pruned):
    block, examples, masks = pruned
    block.idle = torch.nn.Linear(4, 4)
    before = block.idle.weight.detach().clone()
    found = reconstruct(block, examples, masks | {"idle.weight": torch.ones(4, 4, dtype=torch.bool)}, epochs=2)
    assert found[1] < found[0]
    assert torch.equal(block.idle.weight, before)
