"""Settings of the evaluate stage."""

from dataclasses import dataclass

from components.core.checks import DTYPES, at_least, given, one_of
from components.core.corpus import WIKITEXT2, check_data


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure perplexity by the field's convention: token level, non-overlapping blocks."""

    model_dir: str
    """Folder with the checkpoint: dense, sparse or quantized."""
    eval_data: str = WIKITEXT2
    """Corpus spec or tokens folder."""
    eval_blocks: int = 0
    """Evaluation blocks; 0 = all."""
    eval_seq_len: int = 2048
    """Tokens of an evaluation block; published numbers use 2048."""
    dtype: str = "auto"
    """Number format of what is not quantized; auto = float16 on a GPU, float32 on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        given("model_dir", self.model_dir)
        one_of("dtype", self.dtype, DTYPES)
        at_least("eval_blocks", self.eval_blocks, 0)
        at_least("eval_seq_len", self.eval_seq_len, 2)
        check_data("eval_data", self.eval_data)
