"""Load a checkpoint and measure its perplexity."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from components.core.checkpoint.checks import check_checkpoint, check_ids, check_seq_len
from components.core.checkpoint.files import weight_bytes
from components.core.checkpoint.loading import load_tokenizer
from components.core.device import pick_device, pick_dtype
from components.core.history import StageRecord, Stopwatch, versions
from components.core.progress import log_perplexity
from components.core.tokens import load_blocks
from components.core.walk.measure import measure
from components.evaluate.config import EvaluateConfig


def run(config: EvaluateConfig) -> StageRecord:
    """Evaluate a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint, the corpus is too short, or the blocks are too long for the model.
    """
    watch = Stopwatch()
    config.check_environment()
    device = pick_device(config.gpus)
    model_config = check_checkpoint("model_dir", config.model_dir, config.trust_remote_code)
    check_seq_len("eval_seq_len", config.eval_seq_len, model_config)
    tokenizer = load_tokenizer(config.model_dir, config.trust_remote_code)
    blocks = load_blocks("eval_data", config.eval_data, "eval", tokenizer, config.bos, config.eval_seq_len, config.eval_blocks)
    check_ids("eval_data", blocks.ids, model_config)
    result = StageRecord("evaluate", asdict(config), versions=versions())
    dtype, trust = pick_dtype(config.dtype, device, config.model_dir), config.trust_remote_code
    with tempfile.TemporaryDirectory() as place:
        ppl = measure("model_dir", config.model_dir, blocks.ids, dtype, device, Path(place), trust)
    result.measured["perplexity"] = ppl
    log_perplexity("perplexity", result.measured["perplexity"])
    result.measured |= {
        "perplexity_text": blocks.fingerprint(),
        "bos": blocks.bos,
        "bytes": weight_bytes(config.model_dir),
        **watch.read(),
    }
    return result
