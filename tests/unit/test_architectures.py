"""The architectures that the README calls supported pass through all stages; what is refused is refused with a reason."""

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from components.core.checkpoint.loading import load_tokenizer
from components.core.mask.mask import load_mask, pruned_count
from components.core.tokens import load_blocks
from components.distill.config import DistillConfig
from components.distill.stage import run as distill
from components.evaluate.config import EvaluateConfig
from components.evaluate.stage import run as evaluate
from components.prune.config import PruneConfig
from components.prune.stage import run as prune
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run as quantize
from tests.conftest import SMALL, tiny_tokenizer

NO_PADDING = {"pad_token_id": 0}  # the default lies outside the tiny vocabulary
OLD = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None}
SUPPORTED = {
    "Llama": SMALL,
    "Qwen2": SMALL,
    "Qwen3": SMALL,
    "Mistral": SMALL,
    "Gemma": SMALL,
    "Gemma2": SMALL | {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 2.0, "sliding_window": 8},
    "Gemma3Text": SMALL | {"sliding_window": 8},
    "Phi": SMALL,
    "Phi3": SMALL | NO_PADDING,
    "Olmo2": SMALL,
    "SmolLM3": SMALL | NO_PADDING,
    "OPT": OLD | NO_ENDS | {"ffn_dim": 128, "word_embed_proj_dim": 32, "pad_token_id": 1},
    "StableLm": SMALL,
    "Starcoder2": SMALL,
    "Falcon": OLD | NO_ENDS,
    "Glm4": SMALL | NO_PADDING,
    "Granite": SMALL | {"logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5},
    "Cohere": SMALL | NO_PADDING,
    "Cohere2": SMALL | NO_PADDING | {"sliding_window": 8},
    "GPTNeoX": OLD | NO_ENDS | {"intermediate_size": 128},
}
MIXTURES = {
    "Mixtral": SMALL | {"num_local_experts": 4},
    "Qwen3Moe": SMALL | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 8},
}
# what the error of the quantize stage begins with
NO_LINEAR = "model_dir must keep the matrices of its blocks in nn.Linear or experts of transformers to be quantized; "
ALL_IN_ONE = "model_dir must store each expert's matrices by themselves to be quantized; "
NOT_QUANTIZED = {
    "GPT2": ({"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128} | NO_ENDS, NO_LINEAR),
    "GraniteMoe": (SMALL | {"num_local_experts": 4, "logits_scaling": 8.0}, ALL_IN_ONE),
    "GptOss": (SMALL | NO_PADDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}, ALL_IN_ONE),
}
ALL = SUPPORTED | MIXTURES | {name: settings for name, (settings, _) in NOT_QUANTIZED.items()}


def save(folder, name, settings):
    """A tiny random model of an architecture, whose weights are larger than usual: its predictions differ from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # some are zero at first
                parameter.copy_(parameter * 5 if parameter.any() else torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def prune_settings(tmp_path, evaluation, **changes):
    places = {"dense_model": str(tmp_path / "dense"), "output_dir": str(tmp_path / "pruned")}
    settings = places | {"calibration_data": evaluation["eval_data"], "nsamples": 8, "seq_len": 32} | evaluation
    return PruneConfig(**settings | changes)


@pytest.fixture
def evaluation(corpus):
    return {"eval_data": str(corpus), "eval_seq_len": 32, "eval_blocks": 4}


@torch.no_grad()
def plain_perplexity(folder, evaluation):
    """The perplexity by the logits of the model that transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = load_blocks("eval_data", evaluation["eval_data"], "eval", load_tokenizer(folder), "auto", 32, 4).ids
    logits = model(input_ids=ids, use_cache=False).logits.double()
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


def check_sparse(folder, mask):
    """Check that exactly the weights outside the mask are zero, as many as there should be in each matrix."""
    weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, kept in mask.tensors.items():
        for matrix in kept.view(-1, *kept.shape[-2:]):  # of experts, one each
            assert int((~matrix).sum()) == pruned_count(0.7, matrix.numel()), name
        assert torch.equal(weights[name] != 0, kept), name


@pytest.mark.parametrize("name", ALL)
def test_a_supported_architecture_passes_through_all_stages(tmp_path, evaluation, name):
    save(tmp_path / "dense", name, ALL[name])
    before = plain_perplexity(tmp_path / "dense", evaluation)
    assert abs(before - 256) > 1  # far from that of uniform predictions
    pruned = prune(prune_settings(tmp_path, evaluation, idle_experts="magnitude"))
    assert ("idle_matrices" in pruned.measured) is (name == "Qwen3Moe")
    assert pruned.measured["perplexity_before"] == pytest.approx(before, rel=1e-4)
    assert pruned.measured["perplexity"] == pytest.approx(plain_perplexity(tmp_path / "pruned", evaluation), rel=1e-4)
    assert pruned.measured["sparsity"] == pytest.approx(0.7, abs=1e-3)
    mask = load_mask(tmp_path / "pruned")
    check_sparse(tmp_path / "pruned", mask)

    places = {"teacher_model": "dense", "student_model": "pruned", "mask_file": "pruned", "output_dir": "distilled"}
    run = {"train_data": evaluation["eval_data"], "seq_len": 32, "epochs": 2, "max_steps": 3, "learning_rate": 1e-3}
    settings = {setting: str(tmp_path / place) for setting, place in places.items()} | run | evaluation
    distilled = distill(DistillConfig(**settings))
    assert distilled.measured["perplexity"] == pytest.approx(plain_perplexity(tmp_path / "distilled", evaluation), rel=1e-4)
    assert distilled.details["steps"][-1]["loss"] < distilled.details["steps"][0]["loss"]
    check_sparse(tmp_path / "distilled", mask)

    places = {"model_dir": str(tmp_path / "distilled"), "mask_file": str(tmp_path / "pruned")}
    config = QuantizeConfig(**places, output_dir=str(tmp_path / "int8"), **evaluation)
    if name in NOT_QUANTIZED:
        with pytest.raises(ValueError, match=f"^{NOT_QUANTIZED[name][1]}"):
            quantize(config)
        assert not (tmp_path / "int8").exists()
        return
    quantized = quantize(config)
    assert quantized.measured["perplexity"] == pytest.approx(distilled.measured["perplexity"], rel=0.02)
    assert quantized.measured["engine"] == ("compressed-tensors" if name in MIXTURES else "optimum-quanto")
    again = evaluate(EvaluateConfig(model_dir=str(tmp_path / "int8"), **evaluation))
    assert again.measured["perplexity"] == pytest.approx(quantized.measured["perplexity"], rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_experts_are_quantized_to_integers_alone(tmp_path, evaluation, dtype):
    save(tmp_path / "dense", "Mixtral", MIXTURES["Mixtral"])
    places = {"model_dir": str(tmp_path / "dense"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="^format must be int8 for a model with experts, got fp8: optimum-quanto would"):
        quantize(QuantizeConfig(**places, format="fp8", **evaluation))
    record = quantize(QuantizeConfig(**places, dtype=dtype, **evaluation))
    dequantize = CompressedTensorsConfig(dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=dequantize).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict().items():
        if name.endswith("_proj") or "self_attn" in name:
            allowed = weight.abs().amax(-1, keepdim=True) * (0.51 / 127 + (0 if dtype == "float32" else 2**-7))
            assert ((found[name] - weight).abs() <= allowed).all(), name
            assert not torch.equal(found[name], weight)
        else:
            assert torch.equal(found[name], weight.to(getattr(torch, dtype))), name
    assert record.measured["dense_weights"] == 2 * 4 * 64  # what chooses among the experts


def test_linear_layers_outside_the_blocks_are_reported(tmp_path, evaluation, capsys):
    save(tmp_path / "dense", "OPT", SUPPORTED["OPT"])  # which is projected in and out
    record = prune(prune_settings(tmp_path, evaluation))
    assert record.measured["dense_weights"] == 2 * 32 * 64
    assert "4096 weights stay dense: " in capsys.readouterr().out
    assert "dense_weights" not in prune_llama(tmp_path / "llama", evaluation).measured


def prune_llama(folder, evaluation):
    save(folder / "dense", "Llama", SMALL)
    return prune(prune_settings(folder, evaluation))
