"""Settings of the quantize stage."""

from dataclasses import dataclass
from pathlib import Path

from components.core.checks import DTYPES, at_least, given, one_of
from components.core.corpus import WIKITEXT2, check_data
from components.core.files import check_new

FORMATS = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantize the weights of the linear layers; embeddings and head keep their format."""

    model_dir: str
    """Folder with the checkpoint to quantize."""
    output_dir: str
    """Folder to create: the quantized checkpoint and quantize_stats.json."""
    format: str = "int8"
    """`int8`, or `fp8` (e4m3); both symmetric with one scale a row."""
    mask_file: str = ""
    """The checkpoint's sparsity mask; without one, the weights that are zero now must stay zero."""
    eval_data: str = WIKITEXT2
    """Corpus spec or tokens folder for perplexity."""
    eval_blocks: int = 0
    """Evaluation blocks; 0 = all."""
    eval_seq_len: int = 2048
    """Tokens of an evaluation block; published numbers use 2048."""
    dtype: str = "auto"
    """Format of what is not quantized; auto = float16 on a GPU, float32 on a CPU."""
    skip_ppl_eval: bool = False
    """Measure no perplexity."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        given("model_dir", self.model_dir)
        given("output_dir", self.output_dir)
        one_of("format", self.format, FORMATS)
        one_of("dtype", self.dtype, DTYPES)
        at_least("eval_blocks", self.eval_blocks, 0)
        at_least("eval_seq_len", self.eval_seq_len, 2)
        if self.mask_file and not Path(self.mask_file).exists():
            raise ValueError(f"mask_file must exist, got {self.mask_file}")
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
        check_new("output_dir", self.output_dir)
