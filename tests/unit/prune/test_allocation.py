"""Uneven sparsity: exact totals, plans compared with literal references, and a choice that brings the model closer."""

import random
import re

import pytest
import torch
from safetensors.torch import load_file

from components.core.blocks import find_blocks, weights_of
from components.core.checkpoint.saving import part_file
from components.core.mask.integrity import integrity
from components.core.mask.mask import Mask, load_mask, pruned_count
from components.core.walk.work import SharedWork
from components.prune import trials
from components.prune.allocation import Layer, budgeted, denser, first_plans, owl, second_plans, slope
from components.prune.blocks import prune_model
from components.prune.config import HIGHEST, UNIFORM, PruneConfig
from components.prune.stage import run
from components.prune.trials import allocate, layers_of, try_out
from tests.conftest import save_tiny, tiny_model
from tests.unit.prune.test_prune import ids, settings
from tests.walks import walk_of

# two parts in each of four blocks
LAYERS = {f"{block}.{kind}": Layer(block, kind, size) for block in range(4) for kind, size in (("up", 1000), ("down", 500))}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3333, 0.7, 0.949])
@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_exact_and_within_bounds(sparsity, seed):
    chance = random.Random(seed)
    layers = {str(number): Layer(number, "any", chance.randint(30, 5000)) for number in range(50)}
    plan = {name: chance.uniform(-1, 1) * chance.choice((0.05, 0.5)) for name in layers}
    found = budgeted(plan, layers, sparsity)
    counts = {name: pruned_count(found[name], layer.size) for name, layer in layers.items()}
    total = sum(layer.size for layer in layers.values())
    assert sum(counts.values()) == pruned_count(sparsity, total)
    assert list(found) == list(layers)
    for name, layer in layers.items():
        assert 0 <= counts[name] <= layer.size * HIGHEST + 1
        assert counts[name] < layer.size
        assert found[name] * layer.size == pytest.approx(counts[name])


def test_a_budget_follows_the_plan_where_no_bound_is_met():
    found = budgeted({name: 0.1 if layer.part == "up" else 0.0 for name, layer in LAYERS.items()}, LAYERS, 0.7)
    assert {found[name] for name, layer in LAYERS.items() if layer.part == "up"} == {0.667}  # of 0.6667
    assert {found[name] for name, layer in LAYERS.items() if layer.part == "down"} == {0.766}  # of 0.7667


def test_layers_of_a_few_weights_keep_one():
    layers = {"tiny": Layer(0, "gate", 3), "large": Layer(0, "up", 10_000)}
    found = budgeted({"tiny": -1.0}, layers, 0.9)
    assert pruned_count(found["tiny"], 3) == 2


def test_a_slope_is_linear_over_depth():
    assert slope(LAYERS, 0.06) == pytest.approx(
        {f"{block}.{kind}": value for block, value in enumerate((0.06, 0.02, -0.02, -0.06)) for kind in ("up", "down")}
    )
    assert set(slope({"only": Layer(0, "up", 10)}, 0.1).values()) == {0.1}


def test_owl_is_that_of_the_paper():
    """As in the public code: ratios scaled to a range of 2λ, less their mean, added to the density."""
    outliers = [0.01, 0.05, 0.02, 0.02]
    scaled = [(share - min(outliers)) / (max(outliers) - min(outliers)) * 0.08 * 2 for share in outliers]
    wanted = [1 - (each - sum(scaled) / 4 + 1 - 0.7) for each in scaled]
    found = budgeted(owl(LAYERS, outliers), LAYERS, 0.7)
    for name, layer in LAYERS.items():
        assert found[name] == pytest.approx(wanted[layer.block], abs=1 / layer.size)
    assert set(owl(LAYERS, [0.02] * 4).values()) == {0.0}


def test_a_part_of_all_blocks_is_denser():
    assert denser(LAYERS, "down") == {name: 0.05 if layer.part == "down" else 0.0 for name, layer in LAYERS.items()}


def test_plans_that_are_tried_at_once_begin_with_uniform():
    assert {allocation: [*first_plans(allocation, LAYERS)] for allocation in ("slope", "owl", "search")} == {
        "slope": [UNIFORM, "slope +0.1"],
        "owl": [UNIFORM],
        "search": [UNIFORM, "slope +0.1", "slope +0.05", "slope -0.05", "down +0.05", "up +0.05"],
    }
    assert set(first_plans("search", LAYERS)[UNIFORM].values()) == {0.0}


def test_a_search_goes_on_from_what_its_first_walk_has_shown():
    outliers, first = [0.01, 0.05, 0.02, 0.02], first_plans("search", LAYERS)
    none = dict.fromkeys(first, 1.0)
    assert second_plans("slope", LAYERS, none, outliers) == {}
    assert second_plans("owl", LAYERS, none, outliers) == {"owl": owl(LAYERS, outliers)}
    assert [*second_plans("search", LAYERS, none | {"slope +0.05": 0.5}, outliers)] == ["owl"]  # there is no better part
    found = second_plans("search", LAYERS, none | {"slope +0.1": 0.8, "slope -0.05": 0.7, "down +0.05": 0.9}, outliers)
    assert [*found] == ["owl", "slope -0.05, down +0.05"]
    depth, part = first["slope -0.05"], first["down +0.05"]
    assert found["slope -0.05, down +0.05"] == {name: depth[name] + part[name] for name in LAYERS}


def planted(outliers: int, matters: int):
    """A model in which a block has outliers, a few weights that do most of what it does, and one block alone has an effect."""
    model = tiny_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for index, block in enumerate(find_blocks("dense_model", model)[1]):
            for name, weight in weights_of(block).items():
                if index == outliers:
                    weight.copy_(weight.sign() * weight.abs() ** 4 / (weight.abs() ** 3).mean())
                if index != matters and name in ("self_attn.o_proj", "mlp.down_proj"):
                    weight.mul_(1e-4)
    return model


def allocated(model, folder, allocation):
    """The allocation for a model, and the mean sparsity of each block."""
    walk = walk_of(model, folder / "dense")
    found = allocate(walk, folder / "work", ids(16, 32), settings(output_dir=str(folder / "out"), allocation=allocation))
    layers = layers_of(walk, settings())
    removed = [0] * 4
    for name, layer in layers.items():
        removed[layer.block] += pruned_count(found.sparsities[name], layer.size)
    total = sum(layer.size for layer in layers.values())
    return found, [4 * count / total for count in removed]


@pytest.mark.parametrize("allocation", ["slope", "owl", "search"])
def test_a_block_that_needs_more_weights_gets_them(tmp_path, allocation):
    found, sparsities = allocated(planted(0, 0), tmp_path, allocation)
    assert found.name != UNIFORM
    assert sparsities[0] <= 0.601
    assert sparsities[0] == min(sparsities)
    assert found.divergences[found.name] == min(found.divergences.values()) < 0.5 * found.divergences[UNIFORM]
    assert sum(sparsities) / 4 == pytest.approx(0.7, abs=1e-5)


@pytest.mark.parametrize("allocation", ["slope", "owl"])
def test_what_brings_the_model_no_closer_is_not_taken(tmp_path, allocation, capsys):
    found, sparsities = allocated(planted(outliers=0, matters=3), tmp_path, allocation)
    assert found.name == UNIFORM
    assert sparsities == pytest.approx([0.7] * 4, abs=1e-3)
    assert "allocation: uniform is taken, no other is closer to the dense model" in capsys.readouterr().out
    assert [entry["chosen"] for entry in found.as_json()] == [True, False]


def test_a_uniform_allocation_costs_no_walk(tmp_path, monkeypatch):
    monkeypatch.delattr(trials, "try_out")
    found, _ = allocated(tiny_model("llama", num_hidden_layers=4), tmp_path, UNIFORM)
    assert set(found.sparsities.values()) == {0.7}
    assert found.as_json() == []


def test_divergences_are_those_of_models_that_are_pruned_alike(tmp_path):
    """Against whole models: pruned by the stage without refit for a quarter of the text, and KL in float64."""
    model, text = tiny_model("llama"), ids(8, 32)
    walk = walk_of(model, tmp_path / "dense")
    layers, inputs, compared = layers_of(walk, settings()), text[:2], text[2:4]
    candidates = {UNIFORM: dict.fromkeys(layers, 0.7), "slope": budgeted(slope(layers, 0.2), layers, 0.7)}
    (tmp_path / "work").mkdir()
    found = try_out(walk, tmp_path / "work", text, candidates, settings(output_dir=str(tmp_path / "out"), dtype="float32"))
    assert list((tmp_path / "work").glob("*.[01]")) == []  # hidden states
    with torch.no_grad():
        wanted = model(input_ids=compared).logits.double().log_softmax(-1)
    for candidate, sparsities in candidates.items():
        work = SharedWork(tmp_path / candidate, "pruning")
        prune_model(walk, work, inputs, None, sparsities, settings(dtype="float32", refit=0))
        pruned = tiny_model("llama")
        for number in range(3):
            pruned.load_state_dict(load_file(part_file(work.folder, number)), strict=False)
        with torch.no_grad():
            got = pruned(input_ids=compared).logits.double().log_softmax(-1)
        assert found.divergences[candidate] == pytest.approx(float((wanted.exp() * (wanted - got)).sum(-1).mean()), rel=1e-4)


def test_outliers_are_counted_in_the_dense_model(tmp_path):
    model, text = tiny_model("llama"), ids(8, 32)
    walk = walk_of(model, tmp_path / "dense")
    layers = layers_of(walk, settings())
    (tmp_path / "work").mkdir()
    candidates = {UNIFORM: dict.fromkeys(layers, 0.7)}
    found = try_out(walk, tmp_path / "work", text, candidates, settings(output_dir=str(tmp_path / "out")), outliers=True)
    scores: list[list[torch.Tensor]] = [[], []]

    def hook(name: str):
        def keep(module, args):
            scores[layers[name].block].append((module.weight.abs() * args[0].flatten(0, 1).square().sum(0).sqrt()).flatten())

        return keep

    for name in layers:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=text[:2])
    for outliers, block in zip(found.outliers, map(torch.cat, scores), strict=True):
        assert outliers == pytest.approx(float((block > 5 * block.mean()).double().mean()), abs=2 / len(block))
        assert 0 < outliers < 0.1


def test_the_total_of_a_run_is_exact_and_its_mask_tells_each_layers_share(tmp_path, corpus):
    """And the later stages' check of the mask is that of each layer."""
    save_tiny(tmp_path / "dense", num_hidden_layers=3)
    places = {"dense_model": str(tmp_path / "dense"), "calibration_data": str(corpus), "output_dir": str(tmp_path / "out")}
    config = PruneConfig(**places, allocation="search", sparsity=0.63, nsamples=8, seq_len=32, skip_ppl_eval=True)
    record = run(config)
    mask, weights = load_mask(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    kept = {name: int(tensor.sum()) for name, tensor in mask.tensors.items()}
    total = sum(tensor.numel() for tensor in mask.tensors.values())
    assert total - sum(kept.values()) == pruned_count(0.63, total)
    assert record.measured["sparsity"] == (total - sum(kept.values())) / total
    assert isinstance(mask.sparsity, dict)
    assert len(set(mask.sparsity.values())) > 1
    assert integrity(weights, mask)["passed"]
    first = next(iter(mask.tensors))
    other = Mask(mask.tensors, sparsity=mask.sparsity | {first: 0.5})
    assert list(integrity(weights, other)["tensors"]) == [first]
    chosen = [entry["name"] for entry in record.details["allocations"] if entry["chosen"]]
    assert [record.measured["allocation"]] == chosen != [UNIFORM]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": "random"}, "allocation must be one of uniform, slope, owl, search, got 'random'"),
        ({"allocation": "owl", "pattern": "2:4", "sparsity": 0.5}, "allocation must be uniform for pattern 2:4, got owl"),
        ({"allocation": "slope", "sparsity": 0.95}, "sparsity must be below 0.95 for allocation slope, got 0.95"),
        ({"allocation": "search", "nsamples": 3}, "nsamples must be at least 4 for allocation search, got 3"),
        ({"allocation": "owl", "nsamples": 7, "nproc_per_node": 2}, "nsamples must be at least 8 for allocation owl, got 7"),
    ],
)
def test_settings_that_allow_no_uneven_allocation_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        settings(**changes)
