"""Cut the calibration, training and evaluation blocks and write them."""

from dataclasses import asdict

from components.core.checkpoint.checks import check_checkpoint, check_ids, check_seq_len
from components.core.checkpoint.loading import load_tokenizer
from components.core.files import new_directory
from components.core.history import StageRecord, Stopwatch, versions
from components.core.progress import log
from components.core.tokens import build_blocks, count_overlaps, save_tokens
from components.tokenize.config import TokenizeConfig


def run(config: TokenizeConfig) -> StageRecord:
    """Tokenize the texts.

    Raises:
        ValueError: a corpus is empty or too short, a block has more tokens than the model has positions, or most of the
            evaluation text is in the training text.
    """
    watch = Stopwatch()
    config.check_environment()
    model_config = check_checkpoint("model_dir", config.model_dir, config.trust_remote_code)
    check_seq_len("seq_len", config.seq_len, model_config)
    check_seq_len("eval_seq_len", config.eval_seq_len, model_config)
    tokenizer = load_tokenizer(config.model_dir, config.trust_remote_code)
    train = ("train_data", config.train_data)
    train_revision, eval_revision = config.train_revision or None, config.eval_revision or None
    bos, seq_len, seed = config.bos, config.seq_len, config.seed
    blocks = {
        "calibration": build_blocks(*train, "calibration", tokenizer, bos, seq_len, config.nsamples, seed, train_revision),
        "train": build_blocks(*train, "train", tokenizer, bos, seq_len, 0, seed, train_revision),
        "eval": build_blocks(
            "eval_data",
            config.eval_data,
            "eval",
            tokenizer,
            bos,
            config.eval_seq_len,
            config.eval_blocks,
            seed,
            eval_revision,
        ),
    }
    for split, part in blocks.items():
        check_ids("eval_data" if split == "eval" else "train_data", part.ids, model_config)
    result = StageRecord("tokenize", asdict(config), versions=versions())
    result.measured = {f"{split}_blocks": part.ids.shape[0] for split, part in blocks.items()}
    overlapping = count_overlaps("training", blocks["train"].ids, config.eval_data, blocks["eval"])
    result.measured |= {"overlapping_eval_blocks": overlapping, "bos": blocks["eval"].bos, **watch.read()}
    with new_directory(config.output_dir) as scratch:
        save_tokens(blocks, scratch)
    log(f"tokenized: {', '.join(f'{part.ids.shape[0]} {split} blocks' for split, part in blocks.items())}")
    return result
