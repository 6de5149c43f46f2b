"""Perplexity of the student before training, measured as it is afterwards."""

import torch

from components.core.files import scratch_directory
from components.core.history import History, known_perplexity
from components.core.tokens import TokenBlocks
from components.core.walk.measure import measure
from components.distill.config import DistillConfig


def measure_before(
    config: DistillConfig,
    history: History,
    stored: torch.dtype,
    evaluation: TokenBlocks,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Perplexity of the student's file in the number format of the result, unless its history tells it.

    Args:
        config: the stage's settings.
        history: the student's. Each stage measures what it makes in the number format in which it stores it.
        stored: the student's number format.
        evaluation: the text.
        dtype: that of the result.
        device: where the student runs.

    Raises:
        ValueError: the result is not finite.
        OSError: the disk is too full.
    """
    known = known_perplexity(history, evaluation.fingerprint()) if stored == dtype else None
    if known is not None:
        return known
    with scratch_directory(config.output_dir) as place:
        return measure("student_model", config.student_model, evaluation.ids, dtype, device, place, config.trust_remote_code)
