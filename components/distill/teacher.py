"""The teacher's final hidden states, either computed each time or computed once and cached on disk.

Hidden states give the exact logits but are much smaller: 2 bytes times the width per token, against 4 bytes times the
vocabulary. With the cache they are rounded to bfloat16 in every epoch, so a run does not depend on what was already cached.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.core.checkpoint.files import weight_files
from components.core.files import sample_fingerprint
from components.core.history import versions
from components.core.perplexity import decoder_and_head
from components.core.tokens import id_bytes


def cache_name(folder: Path, blocks: Tensor, dtype: torch.dtype, device: torch.device) -> str:
    """A name for the hidden states of training blocks, made from everything that they depend on.

    So a cache left behind by a killed run is used again by the same run, and by no other.

    Args:
        folder: the teacher's checkpoint.
        blocks: training tokens [blocks, seq_len].
        dtype: the teacher's compute dtype.
        device: where it runs.
    """
    used = versions()
    parts = {
        "teacher": sample_fingerprint([folder / "config.json", *weight_files(folder)]),
        "shape": list(blocks.shape),  # the same tokens, cut into other blocks, have other states
        "tokens": hashlib.sha256(id_bytes(blocks)).hexdigest(),
        "computed": [str(dtype), device.type, used["torch"], used["transformers"]],
    }
    return f"teacher-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


class Teacher:
    """The dense model, which provides the hidden states of training blocks.

    Args:
        model: causal language model, in its compute dtype.
        cache: folder for the cache, on a local disk, shared by the processes of this machine; None = no cache.
        blocks: training tokens [blocks, seq_len].
    """

    def __init__(self, model: Any, blocks: Tensor, cache: Path | None) -> None:
        self.blocks, self.cache = blocks, cache
        self.decoder, self.head = decoder_and_head(model, "teacher_model")
        self.device = self.head.weight.device
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            shape = (*blocks.shape, self.head.in_features)
            count = blocks.numel() * self.head.in_features
            # sparse files of their full size, mapped into memory; a block's flag is set after its states are written
            self.states = torch.from_file(str(cache / "hidden.bf16"), shared=True, size=count, dtype=torch.bfloat16).view(shape)
            self.known = torch.from_file(str(cache / "known.u8"), shared=True, size=len(blocks), dtype=torch.uint8)

    @torch.no_grad()
    def hidden(self, rows: Tensor) -> Tensor:
        """Final hidden states [len(rows), seq_len, width] of training blocks, by index."""
        if self.cache is None:
            return self._compute(rows)
        missing = rows[self.known[rows] == 0]
        if missing.numel():
            self.states[missing] = self._compute(missing).to(torch.bfloat16).cpu()
            self.known[missing] = 1
        return self.states[rows].to(self.device, self.head.weight.dtype)

    def _compute(self, rows: Tensor) -> Tensor:
        hidden: Tensor = self.decoder(input_ids=self.blocks[rows].to(self.device), use_cache=False).last_hidden_state
        return hidden

    def forget(self) -> None:
        """Delete the cache from disk."""
        if self.cache:
            shutil.rmtree(self.cache, ignore_errors=True)
