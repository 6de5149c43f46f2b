"""Wanda, ALPS, the refit and exchanges, each compared with a slow and literal reference."""

import itertools

import pytest
import torch

from components.core.mask.mask import pruned_count
from components.prune.refit import refit
from components.prune.selection import keep_largest
from components.prune.swaps import swap
from tests.unit.prune.layers import AWKWARD, alps, awkward_layer, damp, error_of, inputs_with_a_sink, layer, sparsegpt, wanda

PATTERNS = [None, (2, 4)]
METHODS = {"alps": alps, "wanda": wanda, "sparsegpt": sparsegpt}


def pruned(weight, hessian, n_of_m=None, sparsity=0.5):
    """A pruned layer to start from: (weight, mask, target)."""
    ((found, kept),) = sparsegpt([weight], hessian, sparsity, n_of_m, block_size=8)
    return found, kept, weight @ hessian


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_of_m", PATTERNS)
@pytest.mark.parametrize("kind", AWKWARD)
def test_counts_are_exact_and_zeros_are_zero(method, n_of_m, kind):
    weight, hessian = awkward_layer(kind)
    ties = torch.ones(6, 24)
    for (found, kept), again in zip(*(METHODS[method]([weight, ties], hessian, 0.5, n_of_m) for _ in "12"), strict=True):
        assert int((~kept).sum()) == pruned_count(0.5, weight.numel())
        assert n_of_m is None or (kept.view(-1, 4).sum(1) == 2).all()
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
        assert (found[~kept] == 0).all()
        assert torch.equal(found, again[0])
        assert torch.equal(kept, again[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (16, 1), (5, 7)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3333, 0.7])
def test_small_layers_and_uneven_counts(method, rows, columns, sparsity):
    weight, hessian = (part.float() for part in layer(rows, columns))
    before = weight.clone(), hessian.clone()
    ((found, kept),) = METHODS[method]([weight], hessian, sparsity)
    assert int((~kept).sum()) == pruned_count(sparsity, weight.numel())
    if sparsity == 0:
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("n_of_m", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_layers_that_share_their_inputs_are_pruned_as_each_alone(method, n_of_m):
    (one, hessian), (other, _) = layer(6, 32), layer(3, 32, seed=1)
    weights = [one.float(), other.float()]
    together = METHODS[method](weights, hessian.float(), 0.5, n_of_m)
    for weight, (found, kept) in zip(weights, together, strict=True):
        ((wanted, wanted_kept),) = METHODS[method]([weight], hessian.float(), 0.5, n_of_m)
        assert torch.equal(kept, wanted_kept)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_wanda_agrees_with_a_loop_over_rows(sparsity):
    weight, hessian = layer(7, 13)
    ((found, kept),) = wanda([weight.float()], hessian.float(), sparsity)
    count = pruned_count(sparsity, weight.numel())
    for row in range(7):
        scores = [float(weight[row, column].abs() * hessian[column, column] ** 0.5) for column in range(13)]
        removed = sorted(range(13), key=lambda column: scores[column])[: count // 7 + (row < count % 7)]
        assert (~kept[row]).nonzero()[:, 0].tolist() == sorted(removed)
    assert torch.equal(found, weight.float() * kept)


def literal_alps(weight, hessian, sparsity, n_of_m, damping=0.01):
    """Algorithm 1 of the paper in float64, with plain inverses; returns the weights, the mask and the number of iterations."""
    damped = damp(hessian, damping)
    scales = damped.diagonal().sqrt().diag()
    normal = scales.inverse() @ damped @ scales.inverse()
    target = weight @ scales @ normal
    start, before = sparsegpt([weight], hessian.float(), sparsity, n_of_m, damping=damping)[0]
    sparse, dual, rho = start.double() @ scales, torch.zeros_like(weight), 0.1
    for iteration in range(1, 61):
        free = (target - dual + rho * sparse) @ (normal + rho * torch.eye(len(normal))).inverse()
        proposed = free + dual / rho
        order = proposed.abs().view(-1, n_of_m[1] if n_of_m else weight.numel()).argsort(dim=1, descending=True)
        places = n_of_m[0] if n_of_m else weight.numel() - pruned_count(sparsity, weight.numel())
        kept = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :places], True).view(weight.shape)
        sparse = torch.where(kept, proposed, 0.0)
        dual = dual + rho * (free - sparse)
        if iteration % 3 == 0:
            changed = int((kept != before).sum())
            before = kept
            if changed <= 0.0003 * int(kept.sum()):
                break
            share = changed / int(kept.sum())
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
    return sparse @ scales.inverse(), kept, iteration


@pytest.mark.parametrize("n_of_m", [*PATTERNS, (4, 8)])
@pytest.mark.parametrize("seed", [0, 1])
def test_alps_agrees_with_the_literal_algorithm(n_of_m, seed):
    weight, hessian = layer(8, 24, seed)
    wanted, wanted_kept, iterations = literal_alps(weight, hessian, 0.5, n_of_m)
    assert iterations > 6
    ((found, kept),) = alps([weight.float()], hessian.float(), 0.5, n_of_m)
    assert torch.equal(kept, wanted_kept)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_alps_and_a_refit_lose_less_than_sparsegpt_on_inputs_like_a_models():
    inputs = inputs_with_a_sink(1000, 128)
    hessian = 2 / 1000 * inputs.T @ inputs
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for method in (sparsegpt, alps):
        ((found, kept),) = method([weight], hessian, 0.7)
        errors.append([error_of(weight, found, hessian)])
        errors[-1].append(error_of(weight, refit(found, kept, hessian, weight @ hessian), hessian))
    (plain, plain_refit), (best, best_refit) = errors
    assert best_refit <= best
    assert plain_refit < 0.9 * plain
    assert best_refit < 0.9 * plain_refit


@pytest.mark.parametrize("n_of_m", PATTERNS)
@pytest.mark.parametrize("kind", AWKWARD)
def test_the_refit_reaches_least_squares_of_each_row(n_of_m, kind):
    """Against each row's normal equations in float64; where they are singular, any solution has the same error."""
    weight, hessian = awkward_layer(kind)
    start, kept, target = pruned(weight, hessian, n_of_m)
    found = refit(start, kept, hessian, target, iterations=200, tolerance=0)
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for row, columns in enumerate(flags.nonzero()[:, 0] for flags in kept):
        inside, outside = hessian.double()[columns][:, columns], (weight.double() @ hessian.double())[row, columns]
        exact[row, columns] = torch.linalg.lstsq(inside, outside, rcond=1e-9, driver="gelsd").solution
    assert (found[~kept] == 0).all()
    before, after, best = (error_of(weight, new, hessian) for new in (start, found, exact))
    left = 1e-2 if kind == "fewer tokens than inputs" else 1e-3  # float32 does not reach the end where it is singular
    assert 0.99 * best <= after <= 1.01 * best + left * before
    assert after < 0.9 * before


def test_the_refit_fits_any_target():
    """The outputs that another layer gives for other inputs, as those of the dense model are."""
    generator = torch.Generator().manual_seed(0)
    inputs, others = (torch.randn(300, 16, generator=generator) for _ in "12")
    weight = torch.randn(5, 16, generator=generator)
    outputs = (inputs + 0.3 * others) @ weight.T
    kept = keep_largest(weight.abs(), 0.5, None)
    found = refit(weight * kept, kept, inputs.T @ inputs, outputs.T @ inputs, iterations=100, tolerance=0)
    for row, columns in enumerate(flags.nonzero()[:, 0] for flags in kept):
        wanted = torch.linalg.lstsq(inputs[:, columns], outputs[:, row]).solution
        torch.testing.assert_close(found[row, columns], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("kind", AWKWARD)
def test_no_row_of_a_refit_becomes_worse(kind, iterations):
    weight, hessian = awkward_layer(kind)
    for start, kept, target in (pruned(weight, hessian), (weight, torch.ones_like(weight, dtype=torch.bool), weight @ hessian)):
        found = refit(start, kept, hessian, target, iterations=iterations, tolerance=0)
        scale = float(((weight.double() @ hessian.double()) * weight).sum(1).max())
        for row in range(len(weight)):
            before, after = (error_of(weight[row : row + 1], new[row : row + 1], hessian) for new in (start, found))
            assert after <= before + 1e-6 * scale


def test_more_iterations_of_a_refit_are_better_and_the_tolerance_ends_it():
    weight, hessian = awkward_layer("plain")
    start, kept, target = pruned(weight, hessian)
    errors = [error_of(weight, refit(start, kept, hessian, target, iterations=count), hessian) for count in (0, 1, 3, 10, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.2 * errors[-1]
    assert torch.equal(refit(start, kept, hessian, target, tolerance=1), start)


def literal_best_swap(weight, mask, hessian, dense, n_of_m):
    """The best exchange of all, in one row: (error, kept to remove, removed to keep), by solving for the new weight."""
    found = []
    for out, into in itertools.product(mask.nonzero()[:, 0].tolist(), (~mask).nonzero()[:, 0].tolist()):
        if n_of_m and out // n_of_m[1] != into // n_of_m[1]:
            continue
        changed = weight.clone()
        changed[out] = 0
        slope = ((dense - changed) @ hessian)[into]
        changed[into] = slope / hessian[into, into]
        found.append((error_of(dense[None], changed[None], hessian), out, into, changed))
    return min(found, key=lambda entry: entry[0])


@pytest.mark.parametrize("n_of_m", PATTERNS)
@pytest.mark.parametrize("fitted", [False, True])
def test_exchanges_are_the_best_of_all_pairs(n_of_m, fitted):
    weight, hessian = awkward_layer("plain", 4, 16)
    start, kept, target = pruned(weight, hessian, n_of_m)
    if fitted:
        start = refit(start, kept, hessian, target, iterations=100)
    for rounds in (1, 2, 3):
        found, mask = swap(start, kept, hessian, target, n_of_m, rounds=rounds, candidates=16)
        for row in range(4):
            wanted, flags = start[row].double(), kept[row].clone()
            for _ in range(rounds):
                error, out, into, changed = literal_best_swap(wanted, flags, hessian.double(), weight[row].double(), n_of_m)
                if error < error_of(weight[row : row + 1], wanted[None], hessian):
                    wanted, flags[out], flags[into] = changed, False, True
            assert torch.equal(mask[row], flags)
            torch.testing.assert_close(found[row].double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("n_of_m", PATTERNS)
@pytest.mark.parametrize("kind", AWKWARD)
def test_exchanges_keep_the_counts_and_never_raise_the_error(kind, n_of_m, candidates, monkeypatch):
    monkeypatch.setattr("components.prune.swaps.AT_A_TIME", 96)  # a few rows at a time
    weight, hessian = awkward_layer(kind)
    start, kept, target = pruned(weight, hessian, n_of_m)
    found, mask = swap(start, kept, hessian, target, n_of_m, candidates=candidates)
    assert torch.equal(mask.sum(1), kept.sum(1))
    assert n_of_m is None or (mask.view(-1, 4).sum(1) == 2).all()
    assert (found[~mask] == 0).all()
    assert not torch.equal(mask, kept)
    assert error_of(weight, found, hessian) < error_of(weight, start, hessian)


def test_there_is_nothing_to_exchange_in_full_rows():
    weight, hessian = awkward_layer("plain")
    full = torch.ones_like(weight, dtype=torch.bool)
    found, mask = swap(weight, full, hessian, weight @ hessian)
    assert mask.all()
    torch.testing.assert_close(found, weight)
