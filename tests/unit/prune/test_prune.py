"""Pruning a model: its structure, Hessians, masks of whole checkpoints, and what a killed run goes on from."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from components.core.blocks import check_blocks, find_blocks, matrices
from components.core.history import read_history
from components.core.mask.mask import load_mask, pruned_count
from components.core.walk.work import SharedWork, Work
from components.prune import blocks, stage
from components.prune.blocks import part_file, prune_layers, prune_model
from components.prune.calibration import hessians, observe
from components.prune.config import PruneConfig
from components.prune.stage import run
from components.prune.trials import layers_of
from tests.conftest import SMALL, VOCABULARY, save_tiny, tiny_model
from tests.walks import first_batches, walk_of


def ids(count: int, seq_len: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, seq_len), generator=torch.Generator().manual_seed(3))


def settings(**changes) -> PruneConfig:
    plain = {"dense_model": "builtin:smollm2-135m", "output_dir": "/nowhere/new", "eval_data": "builtin:python-docs"}
    return PruneConfig(**(plain | {"calibration_data": "builtin:python-docs"} | changes))


def test_blocks_are_found_by_structure(model):
    name, blocks = find_blocks("dense_model", model)
    assert name == "model.layers"
    assert len(blocks) == 2
    assert "lm_head" not in [layer for block in blocks for layer in matrices(block)]
    assert len(matrices(blocks[0])) == 7


def test_other_weights_are_refused_by_name_unless_they_are_ignored(model):
    name, blocks = find_blocks("dense_model", model)
    blocks[1].mixer = nn.Conv1d(4, 8, 3)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mixer\.weight \[8, 4, 3\] is none, .* ignore named model\.layers\.1\.mixer$"
    ):
        check_blocks("dense_model", name, blocks)
    check_blocks("dense_model", name, blocks, ignore=["*.mixer"])
    with pytest.raises(ValueError, match=r"nn\.ModuleList"):
        find_blocks("dense_model", nn.Sequential(nn.Linear(2, 2)))


def test_rows_must_divide_into_groups(model):
    with pytest.raises(ValueError, match=r"multiples of 48.*q_proj"):
        check_blocks("dense_model", *find_blocks("dense_model", model), 48)


def prune(model, folder, calibration, **changes):
    """Prune a model; returns (its new tensors, which weights are kept, an entry for each layer)."""
    walk, work = walk_of(model, folder / "dense"), SharedWork(folder / "work", "pruning")
    config = settings(**changes)
    prune_model(walk, work, calibration, None, dict.fromkeys(layers_of(walk, config), config.sparsity), config)
    weights = {name: tensor for number in range(3) for name, tensor in load_file(part_file(work.folder, number)).items()}
    layers = [layer for block in work.results for layer in block["layers"]]
    return weights, {layer["name"]: weights[layer["name"]] != 0 for layer in layers}, layers


@pytest.mark.parametrize("tokens_at_a_time", [64, 16])
def test_hessian_is_that_of_the_inputs_and_shared(model, monkeypatch, tokens_at_a_time):
    """In one batch, and in several, of which only the first runs to the end of the block."""
    monkeypatch.setattr("components.core.walk.stream.TOKENS_PER_FORWARD", tokens_at_a_time)
    monkeypatch.setattr("components.prune.calibration.PIECE", 24)  # of 64 and 128 columns
    tokens = ids(4, 16)
    _, blocks = find_blocks("dense_model", model)
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in blocks[0].named_modules()
        if name in matrices(blocks[0])
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    groups = hessians(blocks[0], observe(blocks[0], first_batches(model, tokens)), "block")
    for group in groups:
        for name in group.names:
            rows = seen[name].flatten(0, 1)
            torch.testing.assert_close(group.hessian, 2 / rows.shape[0] * rows.T @ rows, rtol=1e-4, atol=1e-5)
    attention = [[f"self_attn.{name}_proj" for name in names] for names in ("qkv", "o")]
    assert [group.names for group in groups] == [*attention, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_each_layer_has_exactly_the_sparsity_and_the_rest_is_untouched(model, tmp_path, method):
    weights, kept, layers = prune(model, tmp_path, ids(4, 16), method=method, sparsity=0.7)
    assert len(kept) == 14
    for name, parameter in model.named_parameters():
        if name in kept:
            assert int((~kept[name]).sum()) == pruned_count(0.7, parameter.numel())
        else:
            assert torch.equal(weights[name], parameter), name
    assert all(0 < entry["relative_error"] < 1 for entry in layers)


def test_pruning_is_deterministic(tmp_path):
    one, other = (prune(tiny_model("qwen3"), tmp_path / name, ids(4, 16), sparsity=0.6)[0] for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_sparsegpt_beats_magnitude_on_the_models_output(tmp_path):
    tokens, held_out = ids(32, 32), torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(9))
    model = tiny_model("llama")
    with torch.no_grad():
        wanted = model(input_ids=held_out).logits
        errors = {}
        for method in ("sparsegpt", "magnitude"):
            weights, _, _ = prune(tiny_model("llama"), tmp_path / method, tokens, method=method, sparsity=0.5)
            model.load_state_dict(weights)
            errors[method] = float((model(input_ids=held_out).logits - wanted).square().mean())
    assert errors["sparsegpt"] < errors["magnitude"]


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)])
def test_stage_writes_checkpoint_mask_and_history(tmp_path, corpus, capsys, kind, tied):
    dense = save_tiny(tmp_path / "dense", kind, tied)
    record = run(
        PruneConfig(
            dense_model=str(dense),
            output_dir=str(tmp_path / "out"),
            calibration_data=str(corpus),
            eval_data=str(corpus),
            nsamples=4,
            seq_len=32,
            eval_blocks=4,
            eval_seq_len=32,
        )
    )
    printed = capsys.readouterr().out
    assert f"[PPL] before_pruning={record.measured['perplexity_before']:.4f}" in printed
    assert f"[PPL] after_pruning={record.measured['perplexity']:.4f}" in printed
    mask = load_mask(tmp_path / "out")
    weights = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, kept in mask.tensors.items():
        assert (weights[name][~kept] == 0).all()
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    history = read_history(tmp_path / "out")
    assert history["source"]["model_id"] == str(dense)
    assert history["steps"][-1]["parameters"]["sparsity"] == 0.7
    assert history["steps"][-1]["sparse_integrity_check"]["passed"]


def test_skipping_perplexity_needs_no_evaluation_text(tmp_path, corpus, capsys):
    dense = save_tiny(tmp_path / "dense")
    common = {"dense_model": str(dense), "calibration_data": str(corpus), "nsamples": 2, "seq_len": 16}
    record = run(PruneConfig(output_dir=str(tmp_path / "out"), skip_ppl_eval=True, pattern="2:4", sparsity=0.5, **common))
    assert "[PPL]" not in capsys.readouterr().out
    assert "perplexity" not in record.measured
    assert record.measured["sparsity"] == 0.5


def test_half_precision_weights_stay_exact_zeros(tmp_path, corpus):
    dense = save_tiny(tmp_path / "dense")
    run(
        PruneConfig(
            dense_model=str(dense),
            output_dir=str(tmp_path / "out"),
            calibration_data=str(corpus),
            nsamples=2,
            seq_len=16,
            dtype="bfloat16",
            skip_ppl_eval=True,
        )
    )
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    for name, kept in load_mask(tmp_path / "out").tensors.items():
        assert (weights[name][~kept] == 0).all()


def test_experts_that_see_no_token_are_an_error(model):
    _, blocks = find_blocks("dense_model", model)
    batches = first_batches(model, ids(1, 4))
    blocks[0].idle = nn.Linear(64, 64)
    with pytest.raises(
        ValueError,
        match="^nsamples must be large enough for block.idle to see at least 1 of the tokens, it saw 0;",
    ):
        hessians(blocks[0], observe(blocks[0], batches), "block")


def test_activations_that_are_not_finite_are_an_error_with_the_layer_they_begin_at(model):
    """Before anything is computed from them, and in the order of the calls, whatever the order of the layers in the block."""
    block = find_blocks("dense_model", model)[1][0]
    with torch.no_grad():
        block.self_attn.v_proj.weight[3, 5] = torch.inf
    block.self_attn = block._modules.pop("self_attn")
    assert next(iter(matrices(block))) == "mlp.gate_proj"
    rule = "^dtype must hold the activations: the Hessian of model.layers.0.self_attn.o_proj is not finite; try bfloat16$"
    with pytest.raises(ValueError, match=rule):
        hessians(block, observe(block, first_batches(model, ids(2, 16))), "model.layers.0")


def test_activations_of_the_dense_model_that_are_not_finite_are_an_error_too(model):
    block = find_blocks("dense_model", model)[1][0]
    dense = copy.deepcopy(block)
    with torch.no_grad():
        dense.mlp.up_proj.weight[3, 5] = torch.nan
    batches = first_batches(model, ids(2, 16))
    rule = "^dtype must hold the activations: the Hessian of model.layers.0.mlp.down_proj is not finite; try bfloat16$"
    with pytest.raises(ValueError, match=rule):
        hessians(block, observe(block, batches, None, (dense, batches)), "model.layers.0")


def test_activations_of_evaluation_text_that_are_not_finite_are_an_error_before_anything_is_pruned(tmp_path, monkeypatch):
    model, work = tiny_model(), SharedWork(tmp_path / "work", "pruning")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.inf
    evaluation = ids(3, 16)
    calibration = evaluation.clone()
    calibration[calibration == 7] = 8
    evaluation[2, 5] = 7
    monkeypatch.setattr(blocks, "prune_layers", None)
    rule = "^dtype must hold the activations: the output of model.layers.0.input_layernorm is not finite; try bfloat16$"
    with pytest.raises(ValueError, match=rule):
        prune_model(walk_of(model, tmp_path / "dense"), work, calibration, evaluation, {}, settings())


def test_qwen3_has_its_norms_left_alone(tmp_path):
    _, kept, _ = prune(AutoModelForCausalLM.from_config(Qwen3Config(**SMALL)), tmp_path, ids(2, 8))
    assert not [name for name in kept if "norm" in name or "embed" in name or "lm_head" in name]


def test_a_model_that_cannot_be_put_in_place_leaves_no_mask_and_loses_nothing(tmp_path, corpus, monkeypatch, capsys):
    save_tiny(tmp_path / "dense")
    rename = Path.rename

    def fail(path, target):
        if Path(target).name == "pruned":
            raise OSError("the disk went away")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    places = {"dense_model": str(tmp_path / "dense"), "output_dir": str(tmp_path / "pruned"), "calibration_data": str(corpus)}
    config = settings(**places, mask_file=str(tmp_path / "mask.safetensors"), nsamples=2, seq_len=16, skip_ppl_eval=True)
    with pytest.raises(OSError, match="the disk went away"):
        run(config)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".unfinished"]
    assert "finished is kept" in capsys.readouterr().out
    monkeypatch.undo()
    run(config)
    assert "going on after the 2 blocks" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "mask.safetensors", "pruned"]


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("moment", "changes"),
    [
        *((moment, {}) for moment in range(10)),
        *((moment, {"effort": "best"}) for moment in (3, 5)),
        *((moment, {"allocation": "search"}) for moment in (1, 2, 3, 6, 7, 9)),  # two walks of two blocks before all else
    ],
)
def test_a_killed_run_goes_on_and_ends_as_it_would_have(tmp_path, corpus, monkeypatch, moment, changes):
    """Killed before or after each of the moments when something is written."""
    save_tiny(tmp_path / "dense")
    places = {"dense_model": str(tmp_path / "dense"), "calibration_data": str(corpus), "eval_data": str(corpus)}
    common = places | {"nsamples": 4, "seq_len": 16, "eval_blocks": 2, "eval_seq_len": 16} | changes
    pruned: list[str] = []
    monkeypatch.setattr(blocks, "prune_layers", lambda *args: pruned.append(args[-1]) or prune_layers(*args))
    wanted = run(settings(**common, output_dir=str(tmp_path / "wanted")))
    undisturbed, left = len(pruned), [moment]

    def watched(call):
        def wrapper(*args):
            if left[0] == 0:
                raise KilledError
            result = call(*args)
            left[0] -= 2
            if left[0] == -1:
                raise KilledError
            return result

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in ((stage, "finish_checkpoint"), (blocks, "save_tensors"), (Work, "commit")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        with pytest.raises(KilledError):
            run(settings(**common, output_dir=str(tmp_path / "out")))
        left[0] = 1000
        found = run(settings(**common, output_dir=str(tmp_path / "out")))
    for name in ("model.safetensors", "sparsity_mask.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    for measured in ("perplexity_before", "perplexity", "sparsity"):
        assert found.measured[measured] == wanted.measured[measured]
    assert found.sparse_integrity_check == wanted.sparse_integrity_check
    assert found.details["allocations"] == wanted.details["allocations"]
    assert len(pruned) - undisturbed <= 1.5 * undisturbed  # of two blocks, that during which it was killed is pruned again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "wanted"]


def test_calibration_text_is_multiplied_in_bfloat16_only_where_the_models_code_works_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "fast_dtype", lambda *_: torch.bfloat16)
    walk = walk_of(tiny_model(), tmp_path / "dense")
    with walk.outside():
        text = walk.record(ids(2, 16), tmp_path, "text", True)
        assert blocks.made_fast(text, walk, settings()).autocast is torch.bfloat16
        forward = LlamaMLP.forward

        def strict(layer, x):
            out = torch.zeros_like(x)
            out[torch.tensor([0, 1])] = forward(layer, x)  # which takes no other number format
            return out

        monkeypatch.setattr(LlamaMLP, "forward", strict)
        assert blocks.made_fast(text, walk, settings()) is text
