"""Perplexity by the usual convention (GPTQ, SparseGPT): token-level, over non-overlapping blocks.

    PPL = exp( − Σ_blocks Σ_t log p(x_t | x_<t) / number of predicted tokens ),   t = 2 … seq_len within each block

The first token of a block is given, not predicted, be it text or a beginning-of-sequence token (`components.core.tokens`).
Logits are computed for one chunk of tokens at a time, so a [blocks × seq_len × vocabulary] tensor never exists.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from components.core.errors import readable
from components.core.head import Head
from components.core.progress import track

TOKENS_PER_FORWARD = 2048
TOKENS_PER_CHUNK = 128  # 78 MB of float32 logits for a vocabulary of 152,000
PROBE_TOKENS = 8


@torch.no_grad()
def decoder_and_head(model: Any, parameter: str = "the model") -> tuple[nn.Module, Head]:
    """Split a causal language model into its decoder (ids → hidden states) and its head (hidden states → logits).

    Args:
        model: a causal language model.
        parameter: name of the setting that names it, for messages.

    Raises:
        ValueError: there is no head, the logits are not computed from the decoder's last hidden states alone, or they depend on
            later tokens, as those of an encoder do.
    """
    kind = type(model).__name__
    decoder, last = model.base_model, model.get_output_embeddings()
    if decoder is model or last is None:
        raise ValueError(f"{parameter} must be a causal language model with a head, got {kind}")
    seen: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        with readable(f"{parameter} must be a model that transformers can run, {kind} fails"):
            ids = probe_ids(model)
            wanted = model(input_ids=ids, use_cache=False).logits.float()
            if not seen:  # some models call parts of their decoder
                decoder(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    hidden, head = seen[0], Head(model)
    rule = f"{parameter} must compute its logits from the last hidden states alone, {kind} does not"
    with readable(rule):
        found = head(hidden).float()
    # NaN is caught in from_mean_loss
    if hidden.shape[-1] != head.weight.shape[1] or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(rule)
    if differ(hidden[:1, :-1], hidden[1:, :-1]):
        raise ValueError(f"{parameter} must predict each token from those before it, {kind} looks at later ones")
    return decoder, head


def probe_ids(model: Any) -> Tensor:
    """Ids [2, PROBE_TOKENS] of words from all over the vocabulary, on the model's device; the rows differ in their last token.

    There are several, because a padding token's embedding is zero, and so are its logits, capped or not.
    """
    words = model.get_input_embeddings().weight
    row = torch.linspace(0, words.shape[0] - 1, PROBE_TOKENS).long()
    return torch.stack([row, torch.cat([row[:-1], row[:1]])]).to(words.device)


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same computation differ by more than rounding."""
    allowed = torch.finfo(one.dtype).eps ** 0.5 * torch.linalg.vector_norm(one.float())
    return bool(torch.dist(one.float(), other.float()) > allowed)


def perplexity(model: Any, blocks: Tensor, parameter: str = "the model") -> float:
    """Perplexity of a causal language model, which the setting `parameter` names, on token blocks [blocks, seq_len].

    Raises:
        ValueError: blocks have fewer than 2 tokens, `decoder_and_head` refuses the model, or the result is not finite.
    """
    if blocks.shape[1] < 2:
        raise ValueError(f"eval_seq_len must be at least 2, got {blocks.shape[1]}")
    return from_losses(block_losses(*decoder_and_head(model, parameter), blocks), blocks)


@torch.no_grad()
def block_losses(decoder: nn.Module, head: Head, blocks: Tensor) -> Tensor:
    """Sum of the losses over each block's predicted tokens, float64 [blocks], on the head's device.

    Args:
        decoder: ids [batch, seq_len] → hidden states.
        head: hidden states → logits.
        blocks: token ids [blocks, seq_len].
    """
    device = head.weight.device
    batches = blocks.split(max(1, TOKENS_PER_FORWARD // blocks.shape[1]))
    losses = []
    for batch in track(batches, "perplexity", len(batches)):
        ids = batch.to(device)
        losses.append(token_losses(decoder(input_ids=ids, use_cache=False).last_hidden_state, head, ids))
    return torch.cat(losses)


def token_losses(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:
    """Sum of the losses over each row's predicted tokens, float64 [batch].

    Args:
        hidden: final hidden states [batch, seq_len, width].
        head: hidden states → logits.
        ids: token ids [batch, seq_len].
    """
    rows, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()  # [tokens, width], [tokens]
    parts = []
    for part, part_labels in zip(rows.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True):
        parts.append(functional.cross_entropy(head(part).float(), part_labels, reduction="none"))
    return torch.cat(parts).view(len(ids), -1).double().sum(1)


def token_divergences(hidden: Tensor, wanted: Tensor, head: Head) -> Tensor:
    """KL(wanted ‖ found) of the predictions after each token, in nats, summed over each row, float64 [batch].

    Args:
        hidden: final hidden states [batch, seq_len, width].
        wanted: those of the model to compare with, [batch, seq_len, width].
        head: hidden states → logits, the same for both.
    """
    parts = []
    pairs = zip(hidden.flatten(0, 1).split(TOKENS_PER_CHUNK), wanted.flatten(0, 1).split(TOKENS_PER_CHUNK), strict=True)
    for part, wanted_part in pairs:
        found, dense = (head(each).float().log_softmax(-1) for each in (part, wanted_part))
        parts.append(functional.kl_div(found, dense, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts).view(len(hidden), -1).double().sum(1)


def from_losses(losses: Tensor, blocks: Tensor) -> float:
    """The perplexity for the losses of token blocks.

    Args:
        losses: sum over each block's predicted tokens, [blocks].
        blocks: token ids [blocks, seq_len].

    Raises:
        ValueError: the result is not finite.
    """
    return from_mean_loss(float(losses.sum()) / (blocks.shape[0] * (blocks.shape[1] - 1)))


def from_mean_loss(mean: float) -> float:
    """The perplexity for a mean loss per token.

    Raises:
        ValueError: the result is not finite.
    """
    result = math.exp(mean) if mean < 700 else math.inf
    if not math.isfinite(result):
        raise ValueError(f"perplexity must be finite, got {result} (mean loss {mean}); try dtype float32 or bfloat16")
    return result
