"""How far the hidden states of one model are from those of another."""

import torch
from torch import Tensor


def token_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖found − wanted‖² / ‖wanted‖², a scalar, for hidden states [rows, seq_len, width].

    Each token counts by itself: otherwise the few with massive activations would be all that counts.
    """
    found, wanted = found.float(), wanted.float()
    size = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((found - wanted).square().sum(-1) / size).mean()
