"""The teacher's final hidden states, either computed each time or computed once and cached on disk.

Hidden states give the exact logits but are much smaller: 2 bytes times the width per token, against 4 bytes times the
vocabulary. With the cache they are rounded to bfloat16 in every epoch, so a run does not depend on what was already cached.
"""

from typing import Any

import torch
from torch import Tensor

from components.core.perplexity import decoder_and_head
from components.distill.cache import Cache


class Teacher:
    """The dense model, which provides the hidden states of training blocks.

    Args:
        model: causal language model, in its compute dtype.
        blocks: training tokens [blocks, seq_len].
        cache: where states are kept, or None to compute them each time.
    """

    def __init__(self, model: Any, blocks: Tensor, cache: Cache | None) -> None:
        self.blocks, self.cache = blocks, cache
        self.decoder, self.head = decoder_and_head(model, "teacher_model")
        self.device = self.head.weight.device

    @torch.no_grad()
    def hidden(self, rows: Tensor) -> Tensor:
        """Final hidden states [len(rows), seq_len, width] of training blocks, by index."""
        if self.cache is None:
            return self._compute(rows)
        missing = rows[self.cache.known[rows] == 0]
        if missing.numel():
            self.cache.states[missing] = self._compute(missing).to(torch.bfloat16).cpu()
            self.cache.known[missing] = 1
        return self.cache.states[rows].to(self.device, self.head.weight.dtype)

    def _compute(self, rows: Tensor) -> Tensor:
        hidden: Tensor = self.decoder(input_ids=self.blocks[rows].to(self.device), use_cache=False).last_hidden_state
        return hidden
