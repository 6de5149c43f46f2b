"""Token blocks: text as fixed-length rows of token ids, with the fingerprints of the tokenizer and the corpus.

The tokens artifact is a folder with one file, `tokens.safetensors`: int32 tensors `calibration` [nsamples, seq_len], `train`
[n, seq_len] and `eval` [m, eval_seq_len], with the fingerprints as metadata, so that no later stage needs the network.

Some models (Gemma, Llama) have only seen text with a beginning-of-sequence token in front, and much of their attention goes to
it (Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks"). Blocks for them begin with that token, and
seq_len − 1 tokens of text follow. As the first of its block it is never predicted, so with it or without, a block has
seq_len − 1 predictions. In GPTQ it is in front of the whole text alone.

A perplexity is too good if the model has seen the text. An evaluation block overlaps with the training text if they share a run
of `RUN` tokens, the length by which Lee et al. find duplicates (2022, "Deduplicating Training Data Makes Language Models
Better").
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from components.core.corpus import TOKENS_FILE, is_tokens, load_text, text_fingerprint
from components.core.errors import readable, shown
from components.core.progress import log

FORMAT = "token-blocks-2"
SPLITS = ("calibration", "train", "eval")
PROBE = "The quick brown fox, 42 times:\n\n\tümlaut 漢字"
RUN = 50  # consecutive tokens
PIECE = 2**16  # positions of the training text that are hashed at once, so that they stay in the processor's cache
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost modulo 2**64


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of one split.

    Attributes:
        ids: int64 [blocks, seq_len].
        corpus: fingerprint of the text they were cut from.
        tokenizer: fingerprint of the tokenizer.
        bos: `always` if each block begins with the tokenizer's beginning-of-sequence token, otherwise `never`.
    """

    ids: Tensor
    corpus: str
    tokenizer: str
    bos: str

    def fingerprint(self) -> str:
        """Identifies what a perplexity is measured on: exactly these tokens, cut into these blocks."""
        digest = hashlib.sha256(id_bytes(self.ids))
        digest.update(json.dumps([list(self.ids.shape), self.tokenizer]).encode())
        return digest.hexdigest()


def id_bytes(ids: Tensor) -> bytes:
    """Token ids as int32, which is how they are stored and fingerprinted; their shape is not part of it."""
    return ids.to(torch.int32).numpy().tobytes()


def id_fingerprint(ids: Tensor) -> str:
    """SHA-256 of token ids and of their shape: the same tokens, cut into other blocks, are another text."""
    return hashlib.sha256(f"{list(ids.shape)}".encode() + id_bytes(ids)).hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, with the tokenizer's special tokens, as in GPTQ.

    Raises:
        ValueError: the tokenizer fails.
    """
    with readable("the tokenizer must turn any text into token ids; tokenizer.json or tokenizer_config.json may be damaged"):
        ids = tokenizer(text, verbose=False)["input_ids"]
        if not all(isinstance(index, int) for index in ids):
            raise TypeError("it gives something else")
    return list(ids)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and of the token ids of a probe text."""
    probe = encode(tokenizer, PROBE)
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), probe]).encode()).hexdigest()


def bos_for(tokenizer: Any, bos: str) -> str:
    """What the setting `bos` means for a tokenizer: `always` or `never`.

    Raises:
        ValueError: the token is wanted, and the tokenizer has none.
    """
    token = tokenizer.bos_token_id
    if bos == "always" and token is None:
        raise ValueError("bos must be auto or never for a tokenizer without a beginning-of-sequence token, got always")
    if bos != "auto":
        return bos
    return "always" if token is not None and encode(tokenizer, PROBE)[:1] == [token] else "never"


def sequential_blocks(ids: Tensor, seq_len: int, count: int = 0) -> Tensor:
    """Cut a stream of ids [n] into non-overlapping blocks [blocks, seq_len]; only the first `count` if that is not 0."""
    blocks = ids[: ids.numel() // seq_len * seq_len].view(-1, seq_len)
    return blocks[:count] if count else blocks


def random_blocks(ids: Tensor, seq_len: int, count: int, seed: int) -> Tensor:
    """Draw windows [count, seq_len] at random positions in a stream of ids [n], as GPTQ and SparseGPT do to calibrate."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, ids.numel() - seq_len, (count,), generator=generator)
    return torch.stack([ids[start : start + seq_len] for start in starts.tolist()])


def build_blocks(
    parameter: str,
    spec: str,
    split: str,
    tokenizer: Any,
    bos: str,
    seq_len: int,
    count: int,
    seed: int,
    revision: str | None = None,
) -> TokenBlocks:
    """Tokenize a corpus and cut it: random windows for `calibration`, consecutive blocks for `train` and `eval`.

    Args:
        parameter: name of the setting, for error messages.
        spec: see `components.core.corpus`.
        split: `calibration`, `train` or `eval`.
        tokenizer: a Hugging Face tokenizer.
        bos: `auto`, `always` or `never`, see `components.core.settings`.
        seq_len: tokens per block, with the first one that `bos` puts there.
        count: number of blocks; 0 = all (not for calibration).
        seed: seed of the random windows.
        revision: commit of a hub dataset.

    Raises:
        ValueError: the corpus is too short for one block, or for `count` of them, or the tokenizer has no token for `bos`.
    """
    bos = bos_for(tokenizer, bos)
    text = load_text(parameter, spec, "eval" if split == "eval" else "train", revision)
    ids = torch.tensor(encode(tokenizer, text))
    length = seq_len  # of the text in a block
    if bos == "always":
        length -= 1
        ids = ids[int((ids[:1] == tokenizer.bos_token_id).any()) :]  # which its first block gets like any other
    needed = length + 1 if split == "calibration" else length * max(count, 1)
    if ids.numel() < needed:
        raise ValueError(
            f"{parameter} must have at least {needed} tokens for its {split} blocks of {seq_len}, {spec} has {ids.numel()}"
        )
    cut = random_blocks(ids, length, count, seed) if split == "calibration" else sequential_blocks(ids, length, count)
    if bos == "always":
        cut = functional.pad(cut, (1, 0), value=tokenizer.bos_token_id)
    return TokenBlocks(cut, text_fingerprint(text), tokenizer_fingerprint(tokenizer), bos)


def save_tokens(blocks: dict[str, TokenBlocks], folder: Path) -> None:
    """Write the splits of a tokens artifact.

    Raises:
        OSError: the disk is full or not writable.
    """
    metadata = {"format": FORMAT, "tokenizer": blocks["eval"].tokenizer, "bos": blocks["eval"].bos}
    metadata |= {f"corpus.{split}": part.corpus for split, part in blocks.items()}
    tensors = {split: part.ids.to(torch.int32).contiguous() for split, part in blocks.items()}
    try:
        save_file(tensors, folder / TOKENS_FILE, metadata)
    except SafetensorError as error:
        raise OSError(f"writing tokens to {folder.parent} failed: {error}") from error


def load_blocks(
    parameter: str, data: str, split: str, tokenizer: Any, bos: str, seq_len: int, count: int = 0, seed: int = 0
) -> TokenBlocks:
    """Load blocks from a tokens artifact, or build them from a corpus spec. Arguments and errors as in `build_blocks`.

    Raises:
        ValueError: also if the artifact was made with another tokenizer, `bos` or block length, or has too few blocks.
    """
    if not is_tokens(data):
        return build_blocks(parameter, data, split, tokenizer, bos, seq_len, count, seed)
    with (
        readable(f"{parameter} must be a tokens artifact, {data} cannot be read"),
        safe_open(Path(data) / TOKENS_FILE, framework="pt") as file,
    ):
        metadata, stored = file.metadata() or {}, file.get_tensor(split)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{parameter} must be a tokens artifact of format {FORMAT!r}, {data} has {shown(metadata.get('format'))}"
        )
    if not {"tokenizer", "bos", f"corpus.{split}"} <= metadata.keys() or stored.dtype is not torch.int32 or stored.ndim != 2:
        raise ValueError(f"{parameter} must be a tokens artifact, {data} has no {split} blocks with their fingerprints")
    ids = stored.long()
    if metadata["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{parameter} must be tokenized by the model's own tokenizer, {data} is not")
    if metadata["bos"] != bos_for(tokenizer, bos):
        raise ValueError(f"bos must be {shown(metadata['bos'])} for the tokens in {data}, which were made with it, got {bos}")
    if ids.shape[1] != seq_len:
        raise ValueError(f"{parameter} must have blocks of {seq_len} tokens, {data} has {split} blocks of {ids.shape[1]}")
    if ids.shape[0] < max(count, 1):
        raise ValueError(f"{parameter} must have {max(count, 1)} {split} blocks, {data} has {ids.shape[0]}")
    return TokenBlocks(ids[:count] if count else ids, metadata[f"corpus.{split}"], metadata["tokenizer"], metadata["bos"])


def count_overlaps(text: str, training: Tensor, eval_data: str, evaluation: TokenBlocks) -> int:
    """Count the evaluation blocks that overlap with the training text, and say so if there are any.

    Args:
        text: what the training text is for, for messages: `training` or `calibration`.
        training: its blocks [n, seq_len], made with the same `bos` as the evaluation blocks.
        eval_data: the setting that gave the evaluation blocks.
        evaluation: those blocks.

    Raises:
        ValueError: more than half of the evaluation text is in the training text.
    """
    start = int(evaluation.bos == "always")  # where their text begins
    held_out = evaluation.ids[:, start:]
    shares = shared_runs(held_out, training[:, start:])
    if shares.mean() > 0.5:
        raise ValueError(
            f"eval_data must be other text than the {text} text, got {eval_data}: {shares.mean():.0%} of it is in there too"
        )
    overlapping = int((shares > 0).sum())
    if overlapping:
        run = min(RUN, held_out.shape[1])
        log(
            f"{overlapping} of {len(shares)} evaluation blocks share {run} or more consecutive tokens with the {text} text: "
            "their perplexity is too good"
        )
    return overlapping


def shared_runs(evaluation: Tensor, training: Tensor) -> NDArray[np.float64]:
    """For each evaluation block, the share of its runs of `RUN` tokens that also occur in the training blocks.

    A block that is shorter than `RUN` is one run. Runs are compared by hashes of 64 bits.

    Args:
        evaluation: [m, eval_seq_len].
        training: [n, seq_len]; taken as one stream of tokens.

    Returns:
        Shares [m].
    """
    length = min(RUN, evaluation.shape[1])
    runs = _hashes(evaluation.numpy(), length)  # [m, eval_seq_len - length + 1]
    wanted = np.unique(runs)
    found = np.zeros(len(wanted), dtype=bool)
    stream = training.flatten().numpy()
    for start in range(0, len(stream) - length + 1, PIECE):
        hashes = _hashes(stream[start : start + PIECE + length - 1], length)
        places = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        found[places[wanted[places] == hashes]] = True
    shares: NDArray[np.float64] = found[np.searchsorted(wanted, runs)].mean(axis=1)
    return shares


def _hashes(ids: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Polynomial hashes modulo 2**64 (Karp and Rabin, 1987) of all runs of `length` ids along the last axis."""
    ids = ids.astype(np.uint64)
    count = ids.shape[-1] - length + 1
    hashes = np.zeros((*ids.shape[:-1], count), dtype=np.uint64)
    for offset in range(length):
        hashes *= BASE
        hashes += ids[..., offset : offset + count]
    return hashes
