"""Settings of the tokenize stage."""

from dataclasses import dataclass

from components.core.checks import at_least, given
from components.core.corpus import WIKITEXT2, check_corpus, check_held_out
from components.core.files import check_new


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Cut calibration, training and evaluation text into blocks of token ids."""

    model_dir: str
    """Folder with the tokenizer."""
    output_dir: str
    """Folder to create: tokens.safetensors."""
    train_data: str = WIKITEXT2
    """Corpus spec for calibration and training."""
    eval_data: str = WIKITEXT2
    """Corpus spec for perplexity; may be the same, its evaluation split is read."""
    train_revision: str = ""
    """What the resolve stage named for train_data."""
    eval_revision: str = ""
    """What the resolve stage named for eval_data."""
    nsamples: int = 64
    """Calibration blocks."""
    seq_len: int = 512
    """Tokens of a calibration or training block."""
    eval_blocks: int = 0
    """Evaluation blocks; 0 = all."""
    eval_seq_len: int = 2048
    """Tokens of an evaluation block; published numbers use 2048."""
    seed: int = 0
    """Seed of the calibration windows."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer."""

    def __post_init__(self) -> None:
        given("model_dir", self.model_dir)
        given("output_dir", self.output_dir)
        at_least("nsamples", self.nsamples, 1)
        at_least("eval_blocks", self.eval_blocks, 0)
        at_least("seq_len", self.seq_len, 2)
        at_least("eval_seq_len", self.eval_seq_len, 2)
        check_corpus("train_data", self.train_data)
        check_corpus("eval_data", self.eval_data)
        check_held_out("train_data", self.train_data, self.eval_data)
        check_new("output_dir", self.output_dir)
