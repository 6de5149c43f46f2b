"""The tokenize stage, and what it and the stages behind it say about evaluation text that is in the training text."""

import json
from pathlib import Path

import pytest
import torch

from components.core.tokens import TokenBlocks, save_tokens, tokenizer_fingerprint
from components.distill.config import DistillConfig
from components.distill.stage import run as distill
from components.prune.config import PruneConfig
from components.prune.stage import run as prune
from components.tokenize.config import TokenizeConfig
from components.tokenize.stage import run as tokenize
from tests.conftest import save_pruned, tiny_tokenizer

SIZES = {"seq_len": 64, "eval_seq_len": 128}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pruned(folder, corpus)
    return folder


def write_texts(folder: Path, quoted: int) -> dict[str, str]:
    """Random training and evaluation text; each of the first `quoted` blocks of the latter has 60 characters of the former."""
    signs = "".join(map(chr, range(33, 123)))
    train, held_out = (
        "".join(signs[index] for index in torch.randint(90, (2560,), generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 2)
    )
    for block in range(quoted):
        held_out = held_out[: block * 128] + train[block * 60 : block * 60 + 60] + held_out[block * 128 + 60 :]
    texts = {"train_data": folder / "train.txt", "eval_data": folder / "test.txt"}
    for path, text in zip(texts.values(), (train, held_out), strict=True):
        path.write_text(text)
    return {name: str(path) for name, path in texts.items()}


@pytest.mark.parametrize("quoted", [0, 3])
def test_blocks_are_counted_and_so_are_those_that_overlap(pruned, tmp_path, capsys, quoted):
    texts = write_texts(tmp_path, quoted)
    config = TokenizeConfig(model_dir=str(pruned / "dense"), output_dir=str(tmp_path / "out"), nsamples=4, **texts, **SIZES)
    measured = tokenize(config).measured
    numbers = {name: measured[name] for name in measured if name.endswith("blocks")}
    assert numbers == {"calibration_blocks": 4, "train_blocks": 40, "eval_blocks": 20, "overlapping_eval_blocks": quoted}
    told = "evaluation blocks share 50 or more consecutive tokens with the training text: their perplexity is too good"
    assert [line for line in capsys.readouterr().out.splitlines() if told in line] == ([f"3 of 20 {told}"] if quoted else [])


def test_prune_and_distill_count_as_well(pruned, tmp_path, capsys):
    texts = write_texts(tmp_path, 3)
    model, mask = str(pruned / "pruned"), str(pruned / "pruned" / "sparsity_mask.safetensors")
    record = distill(
        DistillConfig(
            teacher_model=str(pruned / "dense"),
            student_model=model,
            mask_file=mask,
            output_dir=str(tmp_path / "distilled"),
            max_steps=1,
            batch_size=2,
            **texts,
            **SIZES,
        )
    )
    assert record.measured["overlapping_eval_blocks"] == 3
    texts["calibration_data"] = texts.pop("train_data")
    record = prune(
        PruneConfig(
            dense_model=str(pruned / "dense"),
            output_dir=str(tmp_path / "new"),
            nsamples=200,
            seq_len=64,
            eval_seq_len=128,
            **texts,
        )
    )
    assert record.measured["overlapping_eval_blocks"] == 3  # the many random windows hold all of the training text
    printed = capsys.readouterr().out
    for text in ("training", "calibration"):
        assert f"3 of 20 evaluation blocks share 50 or more consecutive tokens with the {text} text: " in printed


def save_as_tokens(folder: Path, text: str) -> str:
    """A tokens folder with the training text as its evaluation text."""
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    held_out = TokenBlocks(ids[: len(ids) // 128 * 128].view(-1, 128), "text", tokenizer_fingerprint(tokenizer), "never")
    folder.mkdir()
    save_tokens({"eval": held_out}, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("stage", "disguise"),
    [
        ("tokenize", "another container"),
        ("tokenize", "a character more"),
        ("distill", "another container"),
        ("distill", "a character more"),
        ("distill", "tokens"),  # the tokenize stage takes texts only
    ],
)
def test_training_text_in_another_guise_is_refused(pruned, corpus, tmp_path, stage, disguise):
    text = (corpus / "train.txt").read_text()
    if disguise == "another container":
        held_out = tmp_path / "held_out.jsonl"
        held_out.write_text(json.dumps({"text": text}))
    elif disguise == "a character more":
        held_out = tmp_path / "held_out.txt"
        held_out.write_text(f" {text}")
    else:
        held_out = save_as_tokens(tmp_path / "tokens", text)
    texts = {"train_data": str(corpus / "train.txt"), "eval_data": str(held_out), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=f"^eval_data must be other text than the training text, got {held_out}: .*% of it"):
        if stage == "tokenize":
            tokenize(TokenizeConfig(model_dir=str(pruned / "dense"), **texts, **SIZES))
        else:
            models = {"teacher_model": pruned / "dense", "student_model": pruned / "pruned", "mask_file": pruned / "pruned"}
            distill(DistillConfig(**{name: str(path) for name, path in models.items()}, **texts, **SIZES))
    assert not (tmp_path / "out").exists()
