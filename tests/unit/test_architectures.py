"""The architectures that the README calls supported pass through prune and int8; the others are refused with a reason."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

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
    "Gemma3Text": SMALL | {"sliding_window": 8},
    "Phi": SMALL,
    "Phi3": SMALL | NO_PADDING,
    "Olmo2": SMALL,
    "SmolLM3": SMALL | NO_PADDING,
    "OPT": OLD | NO_ENDS | {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "StableLm": SMALL,
    "Starcoder2": SMALL,
    "Falcon": OLD | NO_ENDS,
    "Glm4": SMALL | NO_PADDING,
    "GPTNeoX": OLD | NO_ENDS | {"intermediate_size": 128},
}
REFUSED = {
    "Mixtral": (SMALL | {"num_local_experts": 4}, "dense_model must keep the matrices of its blocks in nn.Linear layers"),
    "Qwen3Moe": (SMALL | {"num_experts": 4}, "dense_model must keep the matrices of its blocks in nn.Linear layers"),
    "GPT2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
        "dense_model must be a decoder with an nn.ModuleList",
    ),
    "Gemma2": (SMALL | {"final_logit_softcapping": 1.0}, "changes its logits after the head"),
    "Cohere": (SMALL | NO_PADDING, "changes its logits after the head"),
}


def save(folder, name, settings):
    """A tiny random model of an architecture."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def prune_settings(tmp_path, evaluation):
    places = {"dense_model": str(tmp_path / "dense"), "output_dir": str(tmp_path / "pruned")}
    return PruneConfig(**places, calibration_data=evaluation["eval_data"], nsamples=4, seq_len=32, **evaluation)


@pytest.fixture
def evaluation(corpus):
    return {"eval_data": str(corpus), "eval_seq_len": 32, "eval_blocks": 4}


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_architecture_is_pruned_and_quantized(tmp_path, evaluation, name):
    save(tmp_path / "dense", name, SUPPORTED[name])
    pruned = prune(prune_settings(tmp_path, evaluation))
    assert pruned.measured["sparsity"] == pytest.approx(0.7, abs=1e-3)
    places = {
        "model_dir": str(tmp_path / "pruned"),
        "mask_file": str(tmp_path / "pruned"),
        "output_dir": str(tmp_path / "int8"),
    }
    quantized = quantize(QuantizeConfig(**places, **evaluation))
    assert quantized.measured["perplexity"] == pytest.approx(pruned.measured["perplexity"], rel=0.02)


@pytest.mark.parametrize("name", REFUSED)
def test_another_architecture_is_refused_with_a_reason(tmp_path, evaluation, name):
    settings, reason = REFUSED[name]
    save(tmp_path / "dense", name, settings)
    with pytest.raises(ValueError, match=reason):
        prune(prune_settings(tmp_path, evaluation))
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GPT2"])
def test_what_would_stay_dense_in_silence_is_not_quantized(tmp_path, evaluation, name):
    settings, reason = REFUSED[name]
    save(tmp_path / "dense", name, settings)
    with pytest.raises(ValueError, match=reason.replace("dense_model", "model_dir")):
        quantize(QuantizeConfig(model_dir=str(tmp_path / "dense"), output_dir=str(tmp_path / "int8"), **evaluation))
    assert not (tmp_path / "int8").exists()


def test_linear_layers_outside_the_blocks_are_reported(tmp_path, evaluation, capsys):
    save(tmp_path / "dense", "OPT", SUPPORTED["OPT"] | {"word_embed_proj_dim": 32})  # which is projected in and out
    record = prune(prune_settings(tmp_path, evaluation))
    assert record.measured["dense_weights"] == 2 * 32 * 64
    assert "4096 weights stay dense: " in capsys.readouterr().out
    assert "dense_weights" not in prune_llama(tmp_path / "llama", evaluation).measured


def prune_llama(folder, evaluation):
    save(folder / "dense", "Llama", SMALL)
    return prune(prune_settings(folder, evaluation))
