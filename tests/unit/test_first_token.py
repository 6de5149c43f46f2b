"""The first token of blocks: who puts it there, what it does to blocks and perplexities, and what it may not be mixed with."""

import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from components.core.checkpoint.loading import load_model, load_tokenizer
from components.core.history import read_steps
from components.core.tokens import TokenBlocks, bos_for, build_blocks, count_overlaps, load_blocks, random_blocks
from components.distill.cache import cache_name
from components.distill.config import DistillConfig
from components.distill.stage import run as distill
from components.evaluate.config import EvaluateConfig
from components.evaluate.stage import run as evaluate
from components.prune.config import PruneConfig
from components.prune.stage import run as prune
from components.quantize.config import QuantizeConfig
from components.quantize.stage import run as quantize
from components.tokenize.config import TokenizeConfig
from components.tokenize.stage import run as tokenize
from tests.conftest import VOCABULARY, tiny_model, tiny_tokenizer

BOS = VOCABULARY  # the id of the token, behind those of the bytes
SEQ_LEN, EVAL_SEQ_LEN, EVAL_BLOCKS = 32, 64, 5
BLOCKS = {"eval_blocks": EVAL_BLOCKS, "eval_seq_len": EVAL_SEQ_LEN}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that has no beginning-of-sequence token, that has it, or that puts it in front of a text."""
    tokenizer = tiny_tokenizer()
    if kind != "has none":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    if kind == "puts it":
        processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A checkpoint whose tokenizer puts the token in front of a text; tests must not change it."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama", vocab_size=VOCABULARY + 1).save_pretrained(folder)
    tokenizer_of("puts it").save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [BOS, *tiny_tokenizer()("a")["input_ids"]]
    return folder


@pytest.fixture(scope="module")
def texts(corpus) -> dict[str, torch.Tensor]:
    """The tokens of each split, without any that a tokenizer adds."""
    words = tiny_tokenizer()
    files = {"train": "train", "calibration": "train", "eval": "test"}
    return {split: torch.tensor(words((corpus / f"{file}.txt").read_text())["input_ids"]) for split, file in files.items()}


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("has none", {"auto": "never", "never": "never"}),
        ("has it", {"auto": "never", "never": "never", "always": "always"}),
        ("puts it", {"auto": "always", "never": "never", "always": "always"}),
    ],
)
def test_auto_does_what_the_tokenizer_does(kind, choices):
    assert {bos: bos_for(tokenizer_of(kind), bos) for bos in choices} == choices


def test_a_text_that_is_given_another_token_first_has_no_beginning_of_sequence():
    tokenizer = tokenizer_of("has it")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="A $A <s>", special_tokens=[("A", 7), ("<s>", BOS)])
    assert bos_for(tokenizer, "auto") == "never"


@pytest.mark.parametrize("kind", ["has it", "puts it"])
@pytest.mark.parametrize(("split", "count"), [("train", 0), ("eval", 4), ("calibration", 6)])
def test_the_token_is_in_front_of_every_block_and_the_text_follows_whole(corpus, texts, kind, split, count):
    built = build_blocks("data", str(corpus), split, tokenizer_of(kind), "always", SEQ_LEN, count, seed=0)
    text = texts[split]
    if split == "calibration":
        expected = random_blocks(text, SEQ_LEN - 1, count, seed=0)
    else:
        expected = text[: (count or text.numel() // (SEQ_LEN - 1)) * (SEQ_LEN - 1)].view(-1, SEQ_LEN - 1)
    assert built.bos == "always"
    assert built.ids.shape == (len(expected), SEQ_LEN)
    assert (built.ids[:, 0] == BOS).all()
    assert torch.equal(built.ids[:, 1:], expected)


def test_without_it_blocks_are_those_of_gptq(corpus, texts):
    """The whole text is tokenized once, and whatever the tokenizer puts in front of it is there once."""
    for kind, stream in (("puts it", torch.cat([torch.tensor([BOS]), texts["eval"]])), ("has it", texts["eval"])):
        built = build_blocks("data", str(corpus), "eval", tokenizer_of(kind), "never", SEQ_LEN, 0, seed=0)
        assert torch.equal(built.ids, stream[: stream.numel() // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN))
        assert built.bos == "never"


@pytest.mark.parametrize("kind", ["has none", "has it"])
def test_where_the_tokenizer_adds_none_auto_changes_nothing(corpus, kind):
    auto, never = (build_blocks("data", str(corpus), "eval", tokenizer_of(kind), bos, 32, 0, 0) for bos in ("auto", "never"))
    assert torch.equal(auto.ids, never.ids)
    assert (auto.fingerprint(), auto.bos) == (never.fingerprint(), never.bos)


@pytest.mark.parametrize(
    ("split", "characters", "count"),
    [("eval", 31, 0), ("train", 62, 2), ("calibration", 32, 5)],
    ids=["eval", "train", "windows"],
)
def test_a_corpus_needs_a_token_less_for_each_block(tmp_path, split, characters, count):
    spec, tokenizer = tmp_path / "a.txt", tokenizer_of("puts it")
    spec.write_text("x" * characters)
    shape = (max(count, 1), SEQ_LEN)
    assert build_blocks("data", str(spec), split, tokenizer, "auto", SEQ_LEN, count, 0).ids.shape == shape
    spec.write_text("x" * (characters - 1))
    rule = f"^data must have at least {characters} tokens for its {split} blocks of 32, {spec} has {characters - 1}$"
    with pytest.raises(ValueError, match=rule):
        build_blocks("data", str(spec), split, tokenizer, "auto", SEQ_LEN, count, 0)


@pytest.mark.parametrize("bos", ["always", "never"])
def test_overlaps_are_those_of_the_text(bos):
    """Training blocks are shorter than a run that counts, so a token in front of each would hide all of them."""
    stream = torch.randint(VOCABULARY, (40 * 31,), generator=torch.Generator().manual_seed(1))
    text = torch.randint(VOCABULARY, (8, 100), generator=torch.Generator().manual_seed(2))
    text[3] = stream[500:600]
    front = 1 if bos == "always" else 0
    training, evaluation = (torch.nn.functional.pad(ids, (front, 0), value=BOS) for ids in (stream.view(40, 31), text))
    assert count_overlaps("training", training, "test.txt", TokenBlocks(evaluation, "text", "words", bos)) == 1


@torch.no_grad()
def literal_perplexity(folder: Path, text: list[int]) -> float:
    """Each piece of text by itself behind the token, one token predicted after another, in double precision."""
    model = load_model(folder, torch.float32, torch.device("cpu"))
    losses = []
    for block in range(EVAL_BLOCKS):
        seen = [BOS]
        for word in text[block * (EVAL_SEQ_LEN - 1) : (block + 1) * (EVAL_SEQ_LEN - 1)]:
            logits = model(input_ids=torch.tensor([seen])).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(-1)[word]))
            seen.append(word)
    assert len(losses) == EVAL_BLOCKS * (EVAL_SEQ_LEN - 1)
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_that_of_text_behind_the_token(dense, corpus, texts):
    found = {}
    for bos in ("auto", "always", "never"):
        found[bos] = evaluate(EvaluateConfig(model_dir=str(dense), eval_data=str(corpus), bos=bos, **BLOCKS)).measured
    assert found["auto"]["perplexity"] == pytest.approx(literal_perplexity(dense, texts["eval"].tolist()), rel=1e-5)
    assert [found[bos]["bos"] for bos in found] == ["always", "always", "never"]
    assert found["auto"]["perplexity"] == found["always"]["perplexity"]
    assert found["auto"]["perplexity_text"] == found["always"]["perplexity_text"]
    assert found["never"]["perplexity_text"] != found["auto"]["perplexity_text"]
    assert abs(found["never"]["perplexity"] / found["auto"]["perplexity"] - 1) > 1e-3


def tokens_of(dense: Path, corpus: Path, output: Path, bos: str) -> str:
    texts = {"train_data": str(corpus), "eval_data": str(corpus)}
    config = TokenizeConfig(
        model_dir=str(dense), output_dir=str(output), nsamples=4, seq_len=SEQ_LEN, bos=bos, **texts, **BLOCKS
    )
    assert tokenize(config).measured["bos"] == ("always" if bos == "auto" else bos)
    return str(output)


def test_all_stages_use_the_blocks_and_say_so(dense, corpus, tmp_path):
    """Through a tokens folder, as in a pipeline; no perplexity is measured on other blocks."""
    tokens = tokens_of(dense, corpus, tmp_path / "tokens", "auto")
    models = {name: str(tmp_path / name) for name in ("pruned", "distilled", "quantized")}
    data = {"eval_data": tokens, **BLOCKS}
    common = {"nsamples": 4, "seq_len": SEQ_LEN, "calibration_data": tokens}
    prune(PruneConfig(dense_model=str(dense), output_dir=models["pruned"], **common, **data))
    places = {"teacher_model": str(dense), "student_model": models["pruned"], "mask_file": models["pruned"]}
    training = {"train_data": tokens, "seq_len": SEQ_LEN, "max_steps": 2, "grad_accum_steps": 1}
    distill(DistillConfig(output_dir=models["distilled"], **places, **training, **data))
    quantize(QuantizeConfig(model_dir=models["distilled"], output_dir=models["quantized"], **data))
    steps = {step.stage: step.measured for step in read_steps(models["quantized"])}
    assert [steps[stage]["bos"] for stage in ("prune", "distill", "quantize")] == ["always"] * 3
    assert len({step["perplexity_text"] for step in steps.values()}) == 1
    expected = evaluate(EvaluateConfig(model_dir=str(dense), eval_data=str(corpus), **BLOCKS)).measured
    assert steps["prune"]["perplexity_before"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert steps["prune"]["perplexity_text"] == expected["perplexity_text"]
    assert steps["distill"]["perplexity_before"] == steps["prune"]["perplexity"]
    assert load_tokenizer(models["quantized"])("a")["input_ids"][0] == BOS


@pytest.mark.parametrize(("made", "asked"), [("auto", "never"), ("never", "auto"), ("never", "always")])
def test_tokens_that_were_made_otherwise_are_refused(dense, corpus, tmp_path, monkeypatch, made, asked):
    tokens = tokens_of(dense, corpus, tmp_path / "tokens", made)
    monkeypatch.setattr("components.core.checkpoint.weights.Weights.load", None)  # before any weights are read
    data = {"eval_data": tokens, "bos": asked, **BLOCKS}
    model, out = str(dense), str(tmp_path / "out")
    has = "always" if made == "auto" else made
    rule = f"^bos must be {has!r} for the tokens in {re.escape(tokens)}, which were made with it, got {asked}$"
    for run, config in (
        (evaluate, EvaluateConfig(model_dir=model, **data)),
        (quantize, QuantizeConfig(model_dir=model, output_dir=out, **data)),
        (prune, PruneConfig(dense_model=model, output_dir=out, calibration_data=tokens, nsamples=4, seq_len=SEQ_LEN, **data)),
    ):
        with pytest.raises(ValueError, match=rule):
            run(config)
    split = load_blocks("train_data", tokens, "train", load_tokenizer(dense), made, SEQ_LEN)
    assert (split.ids[:, 0] == BOS).all() == (has == "always")


def test_a_token_that_the_tokenizer_lacks_is_refused(checkpoint, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("components.core.checkpoint.weights.Weights.load", None)  # before any weights are read
    data = {"eval_data": str(corpus), "bos": "always", **BLOCKS}
    model, out, sizes = str(checkpoint), str(tmp_path / "out"), {"nsamples": 4, "seq_len": SEQ_LEN}
    rule = "^bos must be auto or never for a tokenizer without a beginning-of-sequence token, got always$"
    for run, config in (
        (tokenize, TokenizeConfig(model_dir=model, output_dir=out, train_data=str(corpus), **sizes, **data)),
        (prune, PruneConfig(dense_model=model, output_dir=out, calibration_data=str(corpus), **sizes, **data)),
        (quantize, QuantizeConfig(model_dir=model, output_dir=out, **data)),
        (evaluate, EvaluateConfig(model_dir=model, **data)),
    ):
        with pytest.raises(ValueError, match=rule):
            run(config)


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="^bos must be one of auto, always, never, got 'sometimes'$"):
        EvaluateConfig(model_dir="somewhere", bos="sometimes")


def test_what_is_kept_of_a_training_is_not_used_for_other_blocks(dense, corpus, tmp_path):
    """Neither the teacher's states nor a checkpoint."""
    tokenizer = load_tokenizer(dense)
    blocks = [build_blocks("data", str(corpus), "train", tokenizer, bos, SEQ_LEN, 0, 0).ids for bos in ("always", "never")]
    names = {cache_name(dense, ids, torch.float32, torch.device("cpu")) for ids in blocks}
    assert len(names) == 2

    sizes = {"nsamples": 4, "seq_len": SEQ_LEN, "skip_ppl_eval": True}
    pruned = str(tmp_path / "pruned")
    prune(PruneConfig(dense_model=str(dense), output_dir=pruned, calibration_data=str(corpus), **sizes))
    plain = {"teacher_model": str(dense), "student_model": pruned, "mask_file": pruned, "train_data": str(corpus)}
    plain |= {"seq_len": SEQ_LEN, "skip_ppl_eval": True, "max_steps": 1}
    plain |= {"checkpoint_dir": str(tmp_path / "checkpoints"), "checkpoint_steps": 1}
    record = distill(DistillConfig(output_dir=str(tmp_path / "first"), **plain))
    assert record.measured["bos"] == "always"
    with pytest.raises(ValueError, match="^checkpoint_dir must hold checkpoints of this run, .* differs in training text: "):
        distill(DistillConfig(output_dir=str(tmp_path / "second"), bos="never", **plain))
