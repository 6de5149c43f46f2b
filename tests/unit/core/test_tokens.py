"""Blocks of token ids: how they are cut, and what a stored folder is checked for."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from components.core.corpus import text_fingerprint
from components.core.tokens import (
    FORMAT,
    PIECE,
    RUN,
    TOKENS_FILE,
    TokenBlocks,
    build_blocks,
    count_overlaps,
    load_blocks,
    random_blocks,
    save_tokens,
    sequential_blocks,
    shared_runs,
    tokenizer_fingerprint,
)
from tests.conftest import tiny_tokenizer

SEQ_LEN = 32


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def other_tokenizer():
    other = tiny_tokenizer()
    other.add_tokens(["alpha"])
    return other


def blocks_of(corpus, tokenizer, seq_len=SEQ_LEN, nsamples=8, seed=0):
    return {
        split: build_blocks("data", str(corpus), split, tokenizer, "auto", seq_len, count, seed)
        for split, count in (("calibration", nsamples), ("train", 0), ("eval", 0))
    }


@pytest.fixture(scope="module")
def stored(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    save_tokens(blocks_of(corpus, tokenizer), folder)
    return str(folder)


def stream(corpus, tokenizer, split):
    return torch.tensor(tokenizer((corpus / f"{split}.txt").read_text())["input_ids"])


def test_sequential_blocks_are_the_stream_itself():
    ids = torch.arange(25)
    blocks = sequential_blocks(ids, 4)
    assert blocks.shape == (6, 4)
    assert torch.equal(blocks.flatten(), ids[:24])
    assert torch.equal(sequential_blocks(ids, 4, 2), blocks[:2])
    assert sequential_blocks(ids, 25).tolist() == [ids.tolist()]
    assert sequential_blocks(ids, 26).shape == (0, 26)


def test_random_blocks_are_windows_of_the_stream():
    windows = random_blocks(torch.arange(100), 10, 50, seed=0)
    assert windows.shape == (50, 10)
    starts = windows[:, 0]
    assert torch.equal(windows, starts[:, None] + torch.arange(10))
    assert starts.unique().numel() > 25


def test_random_blocks_depend_only_on_their_seed():
    ids = torch.arange(10_000)
    torch.manual_seed(1)
    first = random_blocks(ids, 16, 8, seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(random_blocks(ids, 16, 8, seed=3), first)
    assert not torch.equal(random_blocks(ids, 16, 8, seed=4), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator was left alone


def test_random_blocks_of_the_shortest_stream():
    assert random_blocks(torch.arange(11), 10, 3, seed=0).tolist() == [list(range(10))] * 3


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("eval", "test")])
def test_train_and_eval_blocks_are_contiguous_and_do_not_overlap(corpus, tokenizer, split, file):
    ids = stream(corpus, tokenizer, file)
    built = build_blocks("data", str(corpus), split, tokenizer, "auto", SEQ_LEN, 0, seed=0)
    assert built.ids.dtype == torch.int64
    assert built.ids.shape == (ids.numel() // SEQ_LEN, SEQ_LEN)
    assert torch.equal(built.ids.flatten(), ids[: built.ids.numel()])
    assert built.corpus == text_fingerprint((corpus / f"{file}.txt").read_text())
    assert built.tokenizer == tokenizer_fingerprint(tokenizer)


def test_calibration_windows_come_from_the_training_text(corpus, tokenizer):
    ids = stream(corpus, tokenizer, "train")
    windows = ids.unfold(0, SEQ_LEN, 1)
    built = build_blocks("data", str(corpus), "calibration", tokenizer, "auto", SEQ_LEN, 8, seed=0)
    assert built.ids.shape == (8, SEQ_LEN)
    assert all((windows == block).all(1).any() for block in built.ids)
    assert torch.equal(built.ids, random_blocks(ids, SEQ_LEN, 8, seed=0))


def test_count_takes_the_first_blocks(corpus, tokenizer):
    every = build_blocks("data", str(corpus), "eval", tokenizer, "auto", SEQ_LEN, 0, seed=0)
    first = build_blocks("data", str(corpus), "eval", tokenizer, "auto", SEQ_LEN, 3, seed=0)
    assert torch.equal(first.ids, every.ids[:3])


def test_blocks_begin_with_what_the_tokenizer_begins_with(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="A $A", special_tokens=[("A", 7)])
    (tmp_path / "a.txt").write_text("x" * 40)
    built = build_blocks("data", str(tmp_path / "a.txt"), "eval", tokenizer, "auto", 4, 0, seed=0)
    assert built.ids.shape == (10, 4)
    assert built.ids.flatten()[0] == 7
    assert (built.ids.flatten()[1:] != 7).all()


@pytest.mark.parametrize(
    ("split", "characters", "count", "fits"),
    [
        ("eval", 31, 0, False),
        ("eval", 32, 0, True),
        ("train", 63, 2, False),
        ("train", 64, 2, True),
        ("calibration", 32, 5, False),
        ("calibration", 33, 5, True),
    ],
)
def test_a_corpus_that_is_too_short_is_refused(tmp_path, tokenizer, split, characters, count, fits):
    spec = str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("x" * characters)
    if fits:
        built = build_blocks("eval_data", spec, split, tokenizer, "auto", SEQ_LEN, count, 0)
        assert built.ids.shape == (max(count, 1), SEQ_LEN)
        return
    rule = f"^eval_data must have at least {characters + 1} tokens for its {split} blocks of 32, {spec} has {characters}$"
    with pytest.raises(ValueError, match=rule):
        build_blocks("eval_data", spec, split, tokenizer, "auto", SEQ_LEN, count, 0)


def test_round_trip_of_a_tokens_folder(corpus, tokenizer, stored):
    for split, built in blocks_of(corpus, tokenizer).items():
        read = load_blocks("data", stored, split, tokenizer, "auto", SEQ_LEN)
        assert read.ids.dtype == torch.int64
        assert torch.equal(read.ids, built.ids)
        assert (read.corpus, read.tokenizer, read.fingerprint()) == (built.corpus, built.tokenizer, built.fingerprint())


def test_a_tokens_folder_holds_int32_and_its_fingerprints(corpus, tokenizer, stored):
    with safe_open(f"{stored}/{TOKENS_FILE}", framework="pt") as file:
        metadata, kinds = file.metadata(), {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == dict.fromkeys(("calibration", "train", "eval"), torch.int32)
    train, test = (text_fingerprint((corpus / f"{split}.txt").read_text()) for split in ("train", "test"))
    assert metadata == {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "bos": "never",
        "corpus.calibration": train,
        "corpus.train": train,
        "corpus.eval": test,
    }


def test_a_tokens_folder_gives_what_the_corpus_gives(corpus, tokenizer, stored):
    for split, count in (("calibration", 8), ("train", 0), ("eval", 5)):
        from_corpus = load_blocks("data", str(corpus), split, tokenizer, "auto", SEQ_LEN, count)
        from_folder = load_blocks("data", stored, split, tokenizer, "auto", SEQ_LEN, count)
        assert torch.equal(from_folder.ids, from_corpus.ids)
        assert from_folder.fingerprint() == from_corpus.fingerprint()


def test_blocks_of_another_tokenizer_are_refused(other_tokenizer, stored):
    with pytest.raises(ValueError, match=f"^train_data must be tokenized by the model's own tokenizer, {stored} is not$"):
        load_blocks("train_data", stored, "train", other_tokenizer, "auto", SEQ_LEN)


def test_blocks_of_another_length_are_refused(tokenizer, stored):
    rule = f"^train_data must have blocks of 16 tokens, {stored} has train blocks of 32$"
    with pytest.raises(ValueError, match=rule):
        load_blocks("train_data", stored, "train", tokenizer, "auto", 16)


def test_fewer_blocks_than_asked_for_are_refused(tokenizer, stored):
    assert load_blocks("calibration_data", stored, "calibration", tokenizer, "auto", SEQ_LEN, 8).ids.shape[0] == 8
    with pytest.raises(ValueError, match=f"^calibration_data must have 9 calibration blocks, {stored} has 8$"):
        load_blocks("calibration_data", stored, "calibration", tokenizer, "auto", SEQ_LEN, 9)


@pytest.mark.parametrize("kind", ["garbage", "truncated", "no such split", "no metadata"])
def test_what_is_not_a_tokens_folder_is_refused(tmp_path, tokenizer, stored, kind):
    file = tmp_path / TOKENS_FILE
    content = (Path(stored) / TOKENS_FILE).read_bytes()
    if kind == "garbage":
        file.write_bytes(b"garbage garbage")
    elif kind == "truncated":
        file.write_bytes(content[:-1])
    else:
        ids = torch.zeros(3, SEQ_LEN, dtype=torch.int32)
        metadata = {"tokenizer": tokenizer_fingerprint(tokenizer)} if kind == "no such split" else None
        save_file({"train" if kind == "no such split" else "eval": ids}, file, metadata)
    with pytest.raises(ValueError, match="^eval_data must be a tokens artifact"):
        load_blocks("eval_data", str(tmp_path), "eval", tokenizer, "auto", SEQ_LEN)


def test_fingerprint_is_that_of_the_very_tokens():
    ids = torch.arange(64).view(2, 32)
    original = TokenBlocks(ids, "text", "words", "never").fingerprint()
    assert TokenBlocks(ids.clone(), "same tokens of another text", "words", "never").fingerprint() == original
    changed = ids.clone()
    changed[1, 31] += 1
    others = [
        TokenBlocks(changed, "text", "words", "never"),
        TokenBlocks(ids.view(4, 16), "text", "words", "never"),
        TokenBlocks(ids, "text", "w", "never"),
    ]
    assert original not in {other.fingerprint() for other in others}


def test_tokenizer_fingerprint_tells_tokenizers_apart(tokenizer, other_tokenizer):
    assert tokenizer_fingerprint(tiny_tokenizer()) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other_tokenizer) != tokenizer_fingerprint(tokenizer)
    from tokenizers import pre_tokenizers

    same_words = tiny_tokenizer()
    same_words.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert same_words.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_fingerprint(same_words) != tokenizer_fingerprint(tokenizer)


def random_ids(*shape, seed, words=256):
    return torch.randint(words, shape, generator=torch.Generator().manual_seed(seed))


def plain_shares(evaluation, training):
    """What `shared_runs` returns, by comparing runs themselves."""
    length, stream = min(RUN, evaluation.shape[1]), training.flatten().tolist()
    seen = {tuple(stream[start : start + length]) for start in range(len(stream) - length + 1)}
    runs = [[tuple(run) for run in block.unfold(0, length, 1).tolist()] for block in evaluation]
    return [sum(run in seen for run in block) / len(block) for block in runs]


@pytest.mark.parametrize("words", [2, 256, 150_000])
@pytest.mark.parametrize("eval_seq_len", [1, 12, 32, 50, 51, 200])
def test_shared_runs_are_those_of_a_plain_comparison(words, eval_seq_len):
    training, evaluation = random_ids(40, 64, seed=1, words=words), random_ids(30, eval_seq_len, seed=2, words=words)
    stream = training.flatten()
    for block in range(10):  # a part of the training text, from its first to its last token
        length, start = (block + 1) * eval_seq_len // 10, block * (stream.numel() - eval_seq_len) // 9
        evaluation[block, :length] = stream[start : start + length]
    evaluation[10] = stream[-eval_seq_len:]
    wanted = plain_shares(evaluation, training)
    assert shared_runs(evaluation, training).tolist() == wanted
    assert max(wanted) == 1
    if words == 150_000 and eval_seq_len > 1:
        assert min(wanted) == 0


def test_a_run_is_found_wherever_it_is_in_a_long_text():
    training, evaluation = random_ids(2 * PIECE // 64 + 3, 64, seed=1), random_ids(6, 100, seed=2)
    stream = training.flatten()
    for block, start in enumerate([0, PIECE - RUN, PIECE - 1, PIECE, stream.numel() - RUN]):
        evaluation[block, 7 : 7 + RUN] = stream[start : start + RUN]
    assert (shared_runs(evaluation, training) > 0).tolist() == [True] * 5 + [False]


def test_training_text_shorter_than_a_run_overlaps_with_nothing():
    assert shared_runs(random_ids(3, 100, seed=1), random_ids(1, 10, seed=1)).tolist() == [0, 0, 0]


def test_overlapping_blocks_are_counted_and_told(capsys):
    training, evaluation = random_ids(40, 64, seed=1), random_ids(8, 100, seed=2)
    blocks = TokenBlocks(evaluation, "text", "words", "never")
    assert count_overlaps("training", training, "test.txt", blocks) == 0
    assert capsys.readouterr().out == ""
    evaluation[1, 30 : 30 + RUN] = training.flatten()[100 : 100 + RUN]
    evaluation[5, : RUN - 1] = training.flatten()[: RUN - 1]
    evaluation[6] = training.flatten()[500:600]
    assert count_overlaps("training", training, "test.txt", blocks) == 2
    line = "2 of 8 evaluation blocks share 50 or more consecutive tokens with the training text: their perplexity is too good\n"
    assert capsys.readouterr().out == line


def test_an_evaluation_text_most_of_which_is_training_text_is_refused():
    training, evaluation = random_ids(40, 64, seed=1), random_ids(8, 100, seed=2)
    blocks = TokenBlocks(evaluation, "text", "words", "never")
    evaluation[:4] = training.flatten()[300:700].view(4, 100)
    assert count_overlaps("training", training, "test.txt", blocks) == 4
    evaluation[4, :60] = training.flatten()[:60]
    rule = "^eval_data must be other text than the training text, got test.txt: 53% of it is in there too$"
    with pytest.raises(ValueError, match=rule):
        count_overlaps("training", training, "test.txt", blocks)
