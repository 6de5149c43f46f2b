"""Perplexity compared with the plain formula, and models that are not supported."""

import copy
import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
)

from components.core import perplexity as module
from components.core.perplexity import decoder_and_head, perplexity, token_divergences
from tests.conftest import SMALL, tiny_model

OLD = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def random_blocks(blocks: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (blocks, seq_len), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_perplexity(model, blocks: torch.Tensor) -> float:
    """One block at a time, one token at a time, in double precision."""
    total, count = 0.0, 0
    for block in blocks:
        log_probabilities = model(input_ids=block[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(block)):
            total -= float(log_probabilities[position - 1, block[position]])
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize(("blocks", "seq_len"), [(1, 2), (1, 128), (3, 17), (5, 64)])
def test_equals_the_plain_formula(model, blocks, seq_len):
    ids = random_blocks(blocks, seq_len)
    expected = plain_perplexity(model, ids)
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - SMALL["vocab_size"]) > 1  # far from that of uniform predictions


@pytest.mark.parametrize(("forward", "chunk"), [(1, 1), (40, 7), (64, 63), (10_000, 10_000)])
def test_does_not_depend_on_how_it_is_chunked(monkeypatch, forward, chunk):
    model, ids = tiny_model(), random_blocks(5, 32)
    expected = plain_perplexity(model, ids)
    monkeypatch.setattr(module, "TOKENS_PER_FORWARD", forward)
    monkeypatch.setattr(module, "TOKENS_PER_CHUNK", chunk)
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-5)


def test_blocks_know_nothing_of_each_other():
    model, ids = tiny_model("qwen3", tied=True), random_blocks(4, 16)
    losses = [math.log(perplexity(model, block[None])) for block in ids]
    assert perplexity(model, ids) == pytest.approx(math.exp(sum(losses) / 4), rel=1e-6)


def test_a_model_that_predicts_nothing_has_its_vocabulary_as_perplexity():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, random_blocks(2, 32)) == pytest.approx(SMALL["vocab_size"], rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_divergences_are_those_of_the_definition(monkeypatch, chunk):
    monkeypatch.setattr(module, "TOKENS_PER_CHUNK", chunk)
    head, generator = tiny_model().lm_head, torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(3, 5, SMALL["hidden_size"], generator=generator) for _ in "12")
    with torch.no_grad():
        p, q = (head(hidden).double().softmax(-1) for hidden in (wanted, found))
        divergences = token_divergences(found, wanted, head)
        assert float(token_divergences(wanted, wanted, head).abs().max()) == 0
    torch.testing.assert_close(divergences, (p * (p / q).log()).sum(-1).sum(-1), rtol=1e-4, atol=1e-6)


def test_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    perplexity(model, random_blocks(2, 32))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_decoder_and_head_make_the_logits(model):
    decoder, head = decoder_and_head(model)
    ids = random_blocks(2, 16)
    with torch.no_grad():
        assert torch.equal(head(decoder(input_ids=ids).last_hidden_state), model(input_ids=ids).logits)


def test_a_bare_decoder_is_refused():
    with pytest.raises(ValueError, match="^the model must be a causal language model with a head, got LlamaModel$"):
        perplexity(tiny_model().model, random_blocks(1, 8))


CHANGED_LOGITS = {
    "cap 30": Gemma2Config(**SMALL, final_logit_softcapping=30.0),
    "cap 2": Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    "scaled by Granite": GraniteConfig(**SMALL, logits_scaling=8.0),
    "scaled by Cohere": CohereConfig(**SMALL),
    "scaled by the decoder's factor": FalconH1Config(
        **SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, lm_head_multiplier=0.1
    ),
    "transformed before": BertConfig(**OLD, is_decoder=True),
}


@pytest.mark.parametrize("config", CHANGED_LOGITS.values(), ids=CHANGED_LOGITS.keys())
def test_logits_are_those_of_the_model_whatever_it_does_to_them(config):
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20)
        ids = random_blocks(2, 16)
        hidden = model.base_model(input_ids=ids).last_hidden_state
        wanted = model(input_ids=ids).logits
        assert (model.get_output_embeddings()(hidden) - wanted).abs().max() > 0.1
        _, head = decoder_and_head(model)
        torch.testing.assert_close(head(hidden), wanted)
        torch.testing.assert_close(copy.deepcopy(head)(hidden[0]), wanted[0])
    assert perplexity(model, ids) == pytest.approx(plain_perplexity(model, ids), rel=1e-5)


def test_a_model_whose_logits_need_more_than_hidden_states_is_refused():
    model = tiny_model()
    forward = type(model).forward

    def by_position(input_ids, use_cache):
        output = forward(model, input_ids=input_ids, use_cache=use_cache)
        output.logits = output.logits * torch.arange(input_ids.shape[1])[:, None]
        return output

    model.forward = by_position
    rule = "^model_dir must compute its logits from the last hidden states alone, LlamaForCausalLM does not"
    with pytest.raises(ValueError, match=rule):
        perplexity(model, random_blocks(1, 8), "model_dir")


def test_a_model_that_looks_at_later_tokens_is_refused():
    torch.manual_seed(0)
    settings = BertGenerationConfig(**OLD, bos_token_id=None, eos_token_id=None)
    ids = random_blocks(1, 16)
    with pytest.raises(
        ValueError, match="^model_dir must predict each token from those before it, BertGenerationDecoder looks"
    ):
        perplexity(AutoModelForCausalLM.from_config(settings).eval(), ids, "model_dir")
    settings.is_decoder = True
    decoder = AutoModelForCausalLM.from_config(settings).eval()
    assert perplexity(decoder, ids, "model_dir") == pytest.approx(plain_perplexity(decoder, ids), rel=1e-5)


def test_a_model_that_cannot_be_run_is_refused():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 128)
    rule = "^model_dir must be a model that transformers can run, LlamaForCausalLM fails: mat1 and mat2 shapes"
    with pytest.raises(ValueError, match=rule):
        perplexity(model, random_blocks(1, 8), "model_dir")


def test_blocks_of_one_token_are_refused():
    with pytest.raises(ValueError, match="^eval_seq_len must be at least 2, got 1$"):
        perplexity(tiny_model(), random_blocks(3, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_perplexity_that_is_not_finite_is_refused(value):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match="perplexity must be finite, got .*try dtype float32 or bfloat16"):
        perplexity(model, random_blocks(2, 16))


def test_a_loss_too_large_for_an_exponential_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    with pytest.raises(ValueError, match="perplexity must be finite, got inf"):
        perplexity(model, random_blocks(2, 16))
