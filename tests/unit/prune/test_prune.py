"""The walk over the model: structure, recorded calls, Hessians, masks of whole checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, Qwen3Config

from components.core.blocks import check_blocks, find_blocks, linears
from components.core.history import read_history
from components.core.mask.mask import load_mask, pruned_count
from components.prune.calibration import advance, batch_size, capture, hessians
from components.prune.config import PruneConfig
from components.prune.stage import prune_model, run
from tests.conftest import SMALL, VOCABULARY, save_tiny


def ids(count: int, seq_len: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, seq_len), generator=torch.Generator().manual_seed(3))


def settings(**changes) -> PruneConfig:
    plain = {"dense_model": "builtin:smollm2-135m", "output_dir": "/nowhere/new", "eval_data": "builtin:python-docs"}
    return PruneConfig(**(plain | {"calibration_data": "builtin:python-docs"} | changes))


def test_blocks_are_found_by_structure(model):
    name, blocks = find_blocks("dense_model", model)
    assert name == "model.layers"
    assert len(blocks) == 2
    assert "lm_head" not in [layer for block in blocks for layer in linears(block)]
    assert len(linears(blocks[0])) == 7


def test_fused_matrices_are_refused_by_name():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        check_blocks("dense_model", *find_blocks("dense_model", gpt2))
    with pytest.raises(ValueError, match=r"nn\.ModuleList"):
        find_blocks("dense_model", nn.Sequential(nn.Linear(2, 2)))


def test_rows_must_divide_into_groups(model):
    with pytest.raises(ValueError, match=r"multiples of 48.*q_proj"):
        check_blocks("dense_model", *find_blocks("dense_model", model), 48)


def gemma3(**changes):
    """A model whose blocks have sliding or full attention, and are called with different masks and positions."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**(SMALL | {"num_hidden_layers": 6, "sliding_window": 8, "sliding_window_pattern": 3} | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("make", [None, gemma3], ids=["llama-qwen3", "sliding-attention"])
def test_replaying_the_blocks_gives_the_models_own_hidden_states(model, make):
    model = make() if make else model
    tokens = ids(6, 24)
    _, blocks = find_blocks("dense_model", model)
    batches = capture(model, blocks, tokens)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            advance(block, batches, index)
        found = model.base_model.norm(torch.cat([batch.hidden for batch in batches]))
        wanted = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, wanted)
    assert "forward" not in vars(blocks[1])  # nothing is left patched


def test_hessian_is_that_of_the_inputs_and_shared(model):
    tokens = ids(4, 16)
    _, blocks = find_blocks("dense_model", model)
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in linears(blocks[0]).items()
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    found = hessians(blocks[0], capture(model, blocks, tokens), 0, "block")
    for name in linears(blocks[0]):
        rows = seen[name].flatten(0, 1)
        torch.testing.assert_close(found[name], 2 / rows.shape[0] * rows.T @ rows, rtol=1e-4, atol=1e-5)
    assert found["self_attn.q_proj"] is found["self_attn.v_proj"]
    assert found["mlp.gate_proj"] is found["mlp.up_proj"]
    assert len({id(hessian) for hessian in found.values()}) == 4


def test_batches_are_equal_and_bounded():
    assert batch_size(64, 512) == 4
    assert batch_size(7, 512) == 1
    assert batch_size(6, 512) == 3
    assert batch_size(3, 4096) == 1


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_each_layer_has_exactly_the_sparsity_and_the_rest_is_untouched(model, method):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    mask, layers = prune_model(model, ids(4, 16), settings(method=method, sparsity=0.7))
    assert len(mask.tensors) == 14
    for name, parameter in model.named_parameters():
        if name in mask.tensors:
            assert int((~mask.tensors[name]).sum()) == pruned_count(0.7, parameter.numel())
            assert (parameter[~mask.tensors[name]] == 0).all()
        else:
            assert torch.equal(parameter, before[name]), name
    assert {entry["name"] for entry in layers} == set(mask.tensors)
    assert all(0 < entry["relative_error"] < 1 for entry in layers)


def test_pruning_is_deterministic():
    from tests.conftest import tiny_model

    first, second = tiny_model("qwen3"), tiny_model("qwen3")
    tokens = ids(4, 16)
    masks = [prune_model(model, tokens, settings(sparsity=0.6))[0].fingerprint() for model in (first, second)]
    assert masks[0] == masks[1]
    for (name, left), right in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_sparsegpt_beats_magnitude_on_the_models_output():
    from tests.conftest import tiny_model

    tokens, held_out = ids(32, 32), torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(9))
    dense = tiny_model("llama")
    with torch.no_grad():
        wanted = dense(input_ids=held_out).logits
        errors = {}
        for method in ("sparsegpt", "magnitude"):
            model = tiny_model("llama")
            prune_model(model, tokens, settings(method=method, sparsity=0.5))
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
    batches = capture(model, blocks, ids(1, 4))
    blocks[0].idle = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="idle saw none"):
        hessians(blocks[0], batches, 0, "block")


def test_qwen3_has_its_norms_left_alone():
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL))
    mask, _ = prune_model(model, ids(2, 8), settings())
    assert not [name for name in mask.tensors if "norm" in name or "embed" in name or "lm_head" in name]


def test_a_model_that_cannot_be_put_in_place_leaves_no_mask(tmp_path, corpus, monkeypatch):
    save_tiny(tmp_path / "dense")
    rename = Path.rename

    def fail(path, target):
        if Path(target).name == "pruned":
            raise OSError("the disk went away")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    places = {"dense_model": str(tmp_path / "dense"), "output_dir": str(tmp_path / "pruned"), "calibration_data": str(corpus)}
    with pytest.raises(OSError, match="the disk went away"):
        run(settings(**places, mask_file=str(tmp_path / "mask.safetensors"), nsamples=2, seq_len=16, skip_ppl_eval=True))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
