"""Presets and their settings, the order within a block, dense targets, and blocks that are trained to give dense outputs."""

import copy

import pytest
import torch
from torch import nn

from components.core.blocks import find_blocks, matrices
from components.core.walk.stream import Batch
from components.core.walk.work import SharedWork
from components.prune import blocks
from components.prune.calibration import hessians, in_order, observe
from components.prune.conditioning import inverse_factor
from components.prune.layers import best_weight, prune_layers
from components.prune.recipe import EFFORTS, Recipe, recipe_of
from components.prune.trials import layers_of
from tests.conftest import tiny_model
from tests.unit.prune.layers import error_of, layer, sparsegpt
from tests.unit.prune.test_prune import ids, prune, settings
from tests.walks import first_batches, walk_of


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_preset_is_its_recipe(effort):
    assert recipe_of(settings(effort=effort)) == EFFORTS[effort]


def test_what_is_given_differs_from_the_preset():
    found = recipe_of(settings(effort="best", method="wanda", refit=0, swaps=3, reconstruct="none", target="pruned"))
    best = EFFORTS["best"]
    wanted = Recipe("wanda", refit=0, order=best.order, swaps=3, reconstruct_epochs=best.reconstruct_epochs)
    assert found == wanted
    assert not found.needs_dense


def test_the_best_weight_for_other_inputs_is_that_of_least_squares():
    """Σ‖W d − Ŵ x‖² over pairs of inputs, with the damping of the Hessian as a weight on the change of W."""
    generator = torch.Generator().manual_seed(0)
    dense, pruned = torch.randn(200, 12, generator=generator), torch.randn(200, 12, generator=generator)
    pruned = dense + 0.3 * pruned
    weight = torch.randn(5, 12, generator=generator)
    hessian, cross = 2 / 200 * pruned.T @ pruned, 2 / 200 * dense.T @ pruned
    factor = inverse_factor(hessian, 0.05, "layer")
    found = best_weight(weight, hessian, cross, factor)
    shrunk = torch.cat([pruned, (0.05 * hessian.diagonal().clamp_min(hessian.diagonal().median()) * 100).sqrt().diag()])
    moved = torch.linalg.lstsq(shrunk, torch.cat([(dense - pruned) @ weight.T, torch.zeros(12, 5)])).solution.T
    torch.testing.assert_close(found, weight + moved, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_the_same_leave_the_weight_as_it_is():
    weight, hessian = (part.float() for part in layer(6, 16))
    hessian[3] = hessian[:, 3] = 0
    factor = inverse_factor(hessian, 0.01, "layer")
    torch.testing.assert_close(best_weight(weight, hessian, hessian, factor), weight)


def test_what_follows_the_method_only_lowers_the_error():
    weight, hessian = (part.float() for part in layer(24, 32))
    errors = []
    for changes in ({"refit": 0}, {"refit": 20}, {"refit": 20, "swaps": 10}):
        (found,) = prune_layers([weight], hessian, [0.6], settings(method="sparsegpt", **changes), "layer")
        errors.append(error_of(weight, found.weight, hessian))
        assert found.measured["relative_error"] <= found.measured["relative_error_of_method"]
        assert found.measured["damping"] == 0.01
        assert found.measured["condition"] >= 1
        assert ((found.weight == 0) == ~found.mask).all()
    assert errors[0] > errors[1] > errors[2]
    ((plain, _),) = sparsegpt([weight], hessian, 0.6)
    assert errors[0] == pytest.approx(error_of(weight, plain, hessian))


class Mixture(nn.Module):
    """Two experts of two layers each; `second` is not called for the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.router(hidden)
        chosen = self.experts[int(hidden.sum() > 0)]
        return self.out(chosen["down"](chosen["up"](hidden)))


def ordered(block, batches):
    return in_order(block, batches, matrices(block))


def test_layers_come_in_the_order_of_their_calls(model):
    attention = [[f"self_attn.{name}_proj" for name in names] for names in ("qkv", "o")]
    steps = ordered(find_blocks("dense_model", model)[1][0], first_batches(model, ids(2, 16)))
    assert steps == [*attention, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


def test_experts_are_pruned_side_by_side():
    found = ordered(Mixture(), [Batch(range(1), -torch.ones(1, 3, 4), ((), {}))])
    first = ["router", "experts.0.up", "experts.1.up"]
    assert found == [first, ["experts.0.down", "experts.1.down"], ["out"]]


def test_inputs_of_both_models_are_multiplied_token_by_token(model):
    block = find_blocks("dense_model", model)[1][0]
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.self_attn.v_proj.weight.mul_(1.1)
    batches, wanted = list(first_batches(model, ids(4, 16))), list(first_batches(model, ids(4, 16)))
    seen = observe(block, batches, ["self_attn.o_proj"], (other, wanted))
    (group,) = hessians(block, seen, "block")
    assert group.names == ["self_attn.o_proj"]
    torch.testing.assert_close(group.cross, 1.1 * group.hessian, rtol=1e-4, atol=1e-6)


def test_a_model_that_routes_other_tokens_has_no_dense_target():
    block = Mixture()
    with torch.no_grad():
        block.experts[0]["up"].weight.fill_(0.1)
    batches = [[Batch(range(1), sign * torch.ones(1, 3, 4), ((), {}))] for sign in (-1, 1)]
    with pytest.raises(ValueError, match="^target must be pruned for a model that routes its tokens, got dense"):
        observe(block, batches[0], None, (block, batches[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"effort": "balanced"},
        {"effort": "best", "reconstruct_epochs": 2},
        {"order": "sequential"},
        {"target": "dense"},
        {"reconstruct": "block", "method": "wanda", "pattern": "2:4", "sparsity": 0.5},
    ],
)
def test_every_recipe_is_exact_and_better_than_the_plain_method(tmp_path, changes):
    """Measured by what a deeper block gives for calibration text, in comparison with the dense model."""
    plain = {"method": changes.get("method", "sparsegpt"), "refit": 0, "effort": "fast"}
    sparsity = {name: changes[name] for name in ("pattern", "sparsity") if name in changes}
    errors = []
    for name, given in (("plain", plain | sparsity), ("better", changes)):
        weights, kept, layers = prune(tiny_model("llama"), tmp_path / name, ids(16, 32), **given)
        for layer_of in layers:
            removed = int((~kept[layer_of["name"]]).sum())
            assert removed == round(layer_of["sparsity"] * kept[layer_of["name"]].numel())
        errors.append(output_error(weights, ids(16, 32)))
    assert errors[1] < errors[0]


def output_error(weights, tokens):
    """‖h − ĥ‖² / ‖h‖² for the last hidden states of the dense model and of one with these weights."""
    model = tiny_model("llama")
    with torch.no_grad():
        wanted = model.base_model(tokens).last_hidden_state
        model.load_state_dict(weights, strict=False)
        found = model.base_model(tokens).last_hidden_state
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_a_block_that_is_trained_says_so(tmp_path):
    walk, work = walk_of(tiny_model("llama"), tmp_path / "dense"), SharedWork(tmp_path / "work", "pruning")
    blocks.prune_model(
        walk, work, ids(8, 32), None, dict.fromkeys(layers_of(walk, settings()), 0.7), settings(reconstruct="block")
    )
    for block in work.results:
        assert 0 < block["reconstruction"]["error_after"] < block["reconstruction"]["error_before"]
