"""SparseGPT compared with the paper's equations, written out naively with explicit inverses."""

import pytest
import torch

from components.core.mask.mask import pruned_count
from tests.unit.prune import layers
from tests.unit.prune.layers import damp, layer, magnitude


def sparsegpt(weight, hessian, *args, **kwargs):
    """Prune one layer."""
    (result,) = layers.sparsegpt([weight], hessian, *args, **kwargs)
    return result


def literal_sparsegpt(weight, hessian, sparsity, block_size, n_of_m=None, damping=0.01):
    """Algorithm 1, with the inverse Hessian of the weights not yet visited recomputed for each column."""
    weight = weight.clone()
    rows, columns = weight.shape
    damped = damp(hessian, damping)
    inverse = [torch.linalg.inv(damped[column:, column:]) for column in range(columns)]  # of the columns not yet visited
    kept = torch.ones(rows, columns, dtype=torch.bool)
    removed = 0
    for column in range(columns):
        if n_of_m is None and column % block_size == 0:
            end = min(column + block_size, columns)
            scores = {
                (row, other): float(weight[row, other] ** 2 / inverse[other][0, 0])
                for row in range(rows)
                for other in range(column, end)
            }
            target = pruned_count(sparsity, rows * end)
            for place in sorted(scores, key=scores.get)[: target - removed]:
                kept[place] = False
            removed = target
        if n_of_m is not None and column % n_of_m[1] == 0:
            for row in range(rows):
                group = range(column, column + n_of_m[1])
                order = sorted(group, key=lambda other: float(weight[row, other] ** 2 / inverse[other][0, 0]))
                for other in order[: n_of_m[1] - n_of_m[0]]:
                    kept[row, other] = False
        for row in range(rows):
            if not kept[row, column]:
                step = weight[row, column] / inverse[column][0, 0]
                weight[row, column:] -= step * inverse[column][0]
                weight[row, column] = 0
    return weight, kept


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(6, 24, 24), (6, 24, 8), (5, 30, 8), (4, 16, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.93])
def test_agrees_with_the_literal_algorithm(rows, columns, block_size, sparsity):
    weight, hessian = layer(rows, columns)
    wanted, wanted_kept = literal_sparsegpt(weight, hessian, sparsity, block_size)
    found, kept = sparsegpt(weight.float(), hessian.float(), sparsity, block_size=block_size)
    assert torch.equal(kept, wanted_kept)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8), (1, 4)])
def test_agrees_with_the_literal_algorithm_for_n_of_m(n_of_m):
    weight, hessian = layer(6, 32)
    wanted, wanted_kept = literal_sparsegpt(weight, hessian, 0.5, 16, n_of_m)
    found, kept = sparsegpt(weight.float(), hessian.float(), 0.5, n_of_m, block_size=16)
    assert torch.equal(kept, wanted_kept)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sparsity", [0.1, 0.3333, 0.7, 0.999])
def test_removes_exactly_as_many_as_asked_for_even_with_ties(sparsity):
    _, hessian = layer(7, 130)
    weight = torch.ones(7, 130)  # all scores in a column are equal
    found, kept = sparsegpt(weight, hessian.float(), sparsity, block_size=64)
    assert int((~kept).sum()) == pruned_count(sparsity, weight.numel())
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("n_of_m", [(2, 4), (4, 8)])
def test_every_group_keeps_n_of_m(n_of_m):
    weight, hessian = layer(9, 64)
    for kept in (
        sparsegpt(weight.float(), hessian.float(), 0.5, n_of_m, block_size=32)[1],
        magnitude([weight.float()], 0.5, n_of_m)[0][1],
    ):
        assert (kept.view(-1, n_of_m[1]).sum(1) == n_of_m[0]).all()


def test_loses_less_than_magnitude_on_inputs_like_a_models():
    """The inputs have a few strong directions and features of very different scale, as activations do."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(1000, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    inputs = (strong + torch.randn(1000, 128, generator=generator)) * torch.randn(128, generator=generator).exp()
    weight, hessian = torch.randn(32, 128, generator=generator), 2 / 1000 * inputs.T @ inputs
    errors = []
    for found, _ in (sparsegpt(weight, hessian, 0.7), *magnitude([weight], 0.7)):
        change = found - weight
        errors.append(float(((change @ hessian) * change).sum()))
    assert errors[0] < 0.5 * errors[1]


def test_inputs_that_are_always_zero_lose_their_weights():
    weight, hessian = layer(4, 16)
    hessian[3] = 0
    hessian[:, 3] = 0
    found, kept = sparsegpt(weight.float(), hessian.float(), 0.5)
    assert (found[:, 3] == 0).all()
    assert not kept[:, 3].any()
    assert torch.isfinite(found).all()


def test_is_deterministic_and_leaves_its_inputs_alone():
    weight, hessian = (part.float() for part in layer(8, 32))
    before = weight.clone(), hessian.clone()
    first, second = sparsegpt(weight, hessian, 0.6), sparsegpt(weight, hessian, 0.6)
    assert torch.equal(first[0], second[0])
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_a_hessian_that_is_not_positive_definite_is_an_error_not_an_identity():
    weight, hessian = (part.float() for part in layer(4, 16))
    hessian -= 2 * torch.linalg.eigvalsh(hessian).max() * torch.eye(16)
    hessian.diagonal().clamp_min_(1e-3)
    with pytest.raises(ValueError, match=r"positive definite.*my\.layer"):
        sparsegpt(weight, hessian, 0.5, what="my.layer")


def test_magnitude_keeps_the_largest():
    weight = torch.tensor([[1.0, -5.0, 0.5, 2.0]])
    ((found, kept),) = magnitude([weight], 0.5)
    assert kept.tolist() == [[False, True, False, True]]
    assert found.tolist() == [[0.0, -5.0, 0.0, 2.0]]


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
def test_layers_that_share_their_inputs_are_pruned_as_each_alone(n_of_m):
    (one, hessian), (other, _) = layer(6, 32), layer(3, 32, seed=1)
    alone = [sparsegpt(weight.float(), hessian.float(), 0.5, n_of_m, block_size=16) for weight in (one, other)]
    together = layers.sparsegpt([one.float(), other.float()], hessian.float(), 0.5, n_of_m, block_size=16)
    for (found, kept), (wanted, wanted_kept) in zip(together, alone, strict=True):
        assert torch.equal(kept, wanted_kept)
        torch.testing.assert_close(found, wanted)
