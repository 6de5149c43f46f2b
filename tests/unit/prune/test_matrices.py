"""Matrices that are not those of an nn.Linear: of a Conv1D, and of the experts of a mixture; and matrices that stay dense."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from components.core.blocks import check_blocks, find_blocks, matrices, routing, weights_of
from components.core.checkpoint.loading import load_tokenizer
from components.core.mask.mask import load_mask, pruned_count
from components.core.tokens import load_blocks
from components.prune import stage
from components.prune.calibration import hessians, in_order, observe
from components.prune.layers import relative_error
from tests.conftest import SMALL, VOCABULARY, save_tiny, tiny_tokenizer
from tests.unit.prune.test_prune import ids, settings
from tests.walks import first_batches

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=None)
MIXTRAL = MixtralConfig(**SMALL | EXPERTS)
GPT_OSS = GptOssConfig(**SMALL | EXPERTS, pad_token_id=0, sliding_window=8)


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) / 8)
    return model


def inputs_of(model, tokens, module):
    """What the model gives to one of its modules."""
    seen = []
    with torch.no_grad():
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
        model(input_ids=tokens)
        handle.remove()
    return seen[0]


def plain_hessian(rows):
    return 2 / len(rows) * rows.T @ rows


def test_a_matrix_is_seen_as_out_by_in_however_it_is_stored():
    block = find_blocks("dense_model", random_model(GPT2))[1][0]
    assert list(matrices(block)) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert weights_of(block)["mlp.c_fc"].shape == (256, 64)
    block = find_blocks("dense_model", random_model(GPT_OSS))[1][0]
    assert weights_of(block)["mlp.experts.3.gate_up_proj"].shape == (256, 64)
    weights_of(block)["mlp.experts.3.down_proj"].zero_()  # a view
    assert [bool(expert.any()) for expert in block.mlp.experts.down_proj] == [True, True, True, False]


def test_the_hessian_of_a_conv1d_is_that_of_its_inputs():
    model, tokens = random_model(GPT2), ids(4, 16)
    block = find_blocks("dense_model", model)[1][0]
    groups = hessians(block, observe(block, first_batches(model, tokens)), "block")
    assert [group.names for group in groups] == [[name] for name in matrices(block)]
    for group in groups:
        (x,) = inputs_of(model, tokens, block.get_submodule(group.names[0]))
        torch.testing.assert_close(group.hessian, plain_hessian(x.flatten(0, 1)))


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=["Mixtral", "GPT-OSS"])
def test_the_hessian_of_an_expert_is_that_of_the_tokens_routed_to_it(config):
    model, tokens = random_model(config), ids(4, 16)
    block = find_blocks("dense_model", model)[1][0]
    experts = block.mlp.experts
    hidden, chosen, _ = inputs_of(model, tokens, experts)
    groups = {group.names[0]: group for group in hessians(block, observe(block, first_batches(model, tokens)), "block")}
    counts = []
    for expert in range(4):
        rows = hidden[(chosen == expert).any(1)]
        gate_up = rows @ weights_of(block)[f"mlp.experts.{expert}.gate_up_proj"].T
        if hasattr(experts, "gate_up_proj_bias"):
            gate_up = gate_up + experts.gate_up_proj_bias[expert]
        for name, x in (("gate_up_proj", rows), ("down_proj", experts._apply_gate(gate_up))):
            group = groups[f"mlp.experts.{expert}.{name}"]
            assert group.tokens == len(x)
            torch.testing.assert_close(group.hessian, plain_hessian(x.detach()))
        counts.append(len(rows))
    assert sum(counts) == 2 * tokens.numel()
    assert len(set(counts)) > 1


def test_experts_are_pruned_side_by_side_one_matrix_after_the_other():
    model, tokens = random_model(MIXTRAL), ids(4, 16)
    block = find_blocks("dense_model", model)[1][0]
    steps = in_order(block, first_batches(model, tokens), matrices(block))
    experts = [[f"mlp.experts.{expert}.{name}" for expert in range(4)] for name in ("gate_up_proj", "down_proj")]
    assert steps == [[f"self_attn.{name}_proj" for name in "qkv"], ["self_attn.o_proj"], *experts]


def test_what_chooses_among_experts_stays_dense():
    name, blocks = find_blocks("dense_model", random_model(GPT_OSS))
    check_blocks("dense_model", name, blocks)
    biases = {f"mlp.experts.{kind}_proj_bias" for kind in ("gate_up", "down")}
    assert routing(blocks[0]) == {"mlp.router.weight", *biases}
    assert routing(nn.Linear(4, 4)) == set()


@pytest.fixture
def run(tmp_path, corpus):
    """A function that prunes a random model with some settings; returns (record, mask, weights before, weights after)."""

    def prune(config, **changes):
        dense, output = tmp_path / "dense", tmp_path / "pruned"
        model = random_model(config)
        model.save_pretrained(dense)
        tiny_tokenizer().save_pretrained(dense)
        common = {"nsamples": 8, "seq_len": 32, "dtype": "float32", "skip_ppl_eval": True, "calibration_data": str(corpus)}
        record = stage.run(settings(dense_model=str(dense), output_dir=str(output), **common | changes))
        after = AutoModelForCausalLM.from_pretrained(output)
        return record, load_mask(output), model.state_dict(), after.state_dict()

    return prune


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "wanda", "magnitude"])
@pytest.mark.parametrize("config", [GPT2, GPT_OSS], ids=["GPT-2", "GPT-OSS"])
def test_the_recorded_error_is_that_of_the_outputs(run, config, method):
    """For the first matrix of the first block, whose inputs pruning does not change."""
    record, _, before, after = run(config, method=method)
    entry = record.details["layers"][0]
    assert entry["relative_error"] < entry["relative_error_of_method"] < 1
    assert entry["tokens"] == 8 * 32
    model = random_model(config)
    block = find_blocks("dense_model", model)[1][0]
    name = entry["name"].removesuffix(".weight")
    (x,) = inputs_of(model, calibration_ids(record), model.get_submodule(name))
    one, other = (weights[entry["name"]].T if config is GPT2 else weights[entry["name"]] for weights in (before, after))
    rows = x.flatten(0, 1)
    expected = float((rows @ (other - one).T).square().sum() / (rows @ one.T).square().sum())
    assert entry["relative_error"] == pytest.approx(expected, rel=1e-3)
    assert weights_of(block)[entry["linear"]].shape == one.shape
    assert relative_error(one, other, plain_hessian(rows)) == pytest.approx(expected, rel=1e-3)


def calibration_ids(record):
    given = record.parameters
    sizes = load_tokenizer(given["dense_model"]), given["bos"], given["seq_len"], given["nsamples"], given["seed"]
    return load_blocks("calibration_data", given["calibration_data"], "calibration", *sizes).ids


def test_rows_keep_their_pattern_in_every_expert(run):
    _, mask, _, _ = run(GPT_OSS, pattern="2:4", sparsity=0.5)
    for name, kept in mask.tensors.items():
        rows = kept.transpose(1, 2) if "experts" in name else kept
        assert (rows.reshape(-1, 4).sum(1) == 2).all(), name


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_an_idle_expert_is_refused_or_pruned_by_magnitude(run, capsys, tokens):
    """One that no token is routed to; or all, if each needs more tokens than there are."""
    config = Qwen3MoeConfig(**SMALL, num_experts_per_tok=1, num_experts=8, moe_intermediate_size=32)
    rule = rf"^nsamples must be large enough for \S+\.experts\.\d\.gate_up_proj to see at least {tokens} of the tokens, it saw"
    with pytest.raises(ValueError, match=rule):
        run(config, expert_tokens=tokens)
    record, mask, before, after = run(config, expert_tokens=tokens, idle_experts="magnitude")
    fallen = [entry for entry in record.details["layers"] if "fallback" in entry]
    assert record.measured["idle_matrices"] == len(fallen)
    assert 0 < len(fallen) <= 2 * 8 * 2
    printed = capsys.readouterr().out
    for entry in fallen:
        assert entry["tokens"] < tokens
        assert entry["fallback"] == "magnitude"
        assert f"{entry['name'].removesuffix('.weight')} saw {entry['tokens']} calibration tokens" in printed
    *_, expert, kind = entry["linear"].split(".")
    name = f"model.layers.{entry['block']}.mlp.experts.{kind}"
    one, other = before[name][int(expert)], after[name][int(expert)]
    removed = pruned_count(0.7, one.numel())
    threshold = one.abs().flatten().sort().values[removed - 1]
    assert torch.equal(other, one * (one.abs() > threshold))
    assert torch.equal(mask.tensors[name][int(expert)], other != 0)


def test_layers_that_are_ignored_stay_dense(run):
    record, mask, before, after = run(MIXTRAL, ignore="model.layers.0.*,*.q_proj,*.experts.down_proj")
    kept = {f"self_attn.{name}_proj.weight" for name in "kvo"} | {"mlp.experts.gate_up_proj"}
    assert mask.tensors.keys() == {f"model.layers.1.{name}" for name in kept}
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) is (name not in mask.tensors), name
    dense = sum(weight.numel() for name, weight in before.items() if "layers" in name and weight.ndim >= 2)
    dense -= sum(tensor.numel() for tensor in mask.tensors.values())
    assert record.measured["dense_weights"] == dense
    assert record.sparse_integrity_check["passed"]


@pytest.mark.parametrize(
    ("ignore", "rule"),
    [
        (
            "*.q_proj,*.typo",
            r"^ignore must name layers of model\.layers, such as model\.layers\.0\.self_attn\.q_proj, got '\*\.typo'$",
        ),
        ("*", r"^ignore must leave something to prune, got '\*'$"),
        ("lm_head", r"^ignore must name layers of model\.layers, "),
        ("a, b", r"^ignore must be names separated by commas, such as \*\.self_attn\.\*, got 'a, b'$"),
    ],
)
def test_patterns_that_name_nothing_or_everything_are_refused(tmp_path, corpus, ignore, rule):
    save_tiny(tmp_path / "dense")
    places = {"dense_model": str(tmp_path / "dense"), "output_dir": str(tmp_path / "out"), "calibration_data": str(corpus)}
    with pytest.raises(ValueError, match=rule):
        stage.run(settings(**places, skip_ppl_eval=True, seq_len=16, ignore=ignore))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_a_preset_suits_a_mixture(run, effort, capsys):
    record, *_ = run(MIXTRAL, effort=effort, reconstruct_epochs=1)
    assert record.sparse_integrity_check["passed"]
    assert [each["block"] for each in record.details["reconstruction"]] == [0, 1]
    assert f"target is pruned, not dense as in effort {effort}: model.layers has experts" in capsys.readouterr().out


@pytest.mark.parametrize(("parameter", "value", "rule"), [("target", "dense", "pruned"), ("allocation", "owl", "uniform")])
def test_what_a_mixture_cannot_have_is_refused(run, parameter, value, rule):
    with pytest.raises(
        ValueError, match=rf"^{parameter} must be {rule} for a model with experts, got {value}: model\.layers has some$"
    ):
        run(MIXTRAL, **{parameter: value})
