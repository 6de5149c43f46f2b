"""Tiny random models, a tokenizer and text, generated in seconds without network or hub."""

import contextlib
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from components.core import retry
from tests.small_disk import SmallDisk
from tests.stores import servers

__all__ = ["servers"]  # one server of each kind for all tests

VOCABULARY = 256
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_model(kind: str = "llama", tied: bool = False, seed: int = 0, **changes):
    """A random causal language model, of two blocks unless its configuration is changed."""
    torch.manual_seed(seed)
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind]
    model = AutoModelForCausalLM.from_config(config_class(**SMALL | changes, tie_word_embeddings=tied))
    # larger weights than the usual initialisation: predictions that differ from uniform make differences visible
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny(folder: Path, kind: str = "llama", tied: bool = False, seed: int = 0, **changes) -> Path:
    """Save a tiny checkpoint; return its folder."""
    tiny_model(kind, tied, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_pruned(folder: Path, corpus: Path) -> None:
    """Save a tiny dense checkpoint `dense`, and its pruned student `pruned` with the mask."""
    from components.prune.config import PruneConfig
    from components.prune.stage import run

    save_tiny(folder / "dense", "qwen3", tied=True)
    run(
        PruneConfig(
            dense_model=str(folder / "dense"),
            output_dir=str(folder / "pruned"),
            calibration_data=str(corpus),
            nsamples=8,
            seq_len=32,
            skip_ppl_eval=True,
        )
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny dense checkpoint; tests must not change it."""
    return save_tiny(tmp_path_factory.mktemp("models") / "dense", "qwen3", tied=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.txt and test.txt; tests must not change it."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    for split, seed in (("train", 1), ("test", 2)):
        order = torch.randint(len(words), (3000,), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / f"{split}.txt").write_text(" ".join(words[index] for index in order))
    return folder


@pytest.fixture(params=[("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)], ids=str)
def model(request):
    """Each kind of tiny model in turn: Llama and Qwen3, untied and tied."""
    return tiny_model(*request.param)


@pytest.fixture
def disk_of(tmp_path):
    """A function that mounts a disk of a given size; the test is skipped where it may not."""
    with contextlib.ExitStack() as mounted:

        def mount(size: str) -> SmallDisk:
            try:
                return mounted.enter_context(SmallDisk(tmp_path / "disk", size))
            except OSError as error:
                pytest.skip(f"only root may mount a small disk: {error}")

        yield mount


@pytest.fixture
def small_disk(disk_of) -> Path:
    """A disk of 128 KiB, which is smaller than any of the tiny models."""
    return disk_of("128k").folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Requests that are sent again need not wait for servers on this machine."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
