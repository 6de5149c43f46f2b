"""Settings of the prune stage."""

from dataclasses import dataclass
from pathlib import Path

from components.core.checks import DTYPES, above, at_least, given, one_of, parse_pattern
from components.core.corpus import WIKITEXT2, check_data, check_held_out
from components.core.files import check_new
from components.core.models import check_model_id

METHODS = ("sparsegpt", "magnitude")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Prune the linear layers of a language model's blocks in one shot."""

    model_id: str
    """Folder with a dense checkpoint, hub id with optional @revision, or builtin:smollm2-135m."""
    output_dir: str
    """Folder to create: the sparse checkpoint, sparsity_mask.safetensors, prune_stats.json."""
    mask_file: str = ""
    """Where to write the mask instead of the output folder: a file outside it."""
    sparsity: float = 0.7
    """Share of weights to remove from each linear layer, in [0, 1); for a pattern N:M it must be 1 - N/M."""
    pattern: str = "unstructured"
    """`unstructured`, or N:M to keep N of every M neighbouring weights of a row, e.g. 2:4."""
    method: str = "sparsegpt"
    """`sparsegpt` (Hessian-aware, repairs the kept weights) or `magnitude` (the plain baseline)."""
    nsamples: int = 64
    """Calibration blocks."""
    seq_len: int = 512
    """Tokens of a calibration block."""
    calibration_data: str = WIKITEXT2
    """Corpus spec or tokens folder for calibration."""
    eval_data: str = WIKITEXT2
    """Corpus spec or tokens folder for perplexity."""
    eval_blocks: int = 0
    """Evaluation blocks; 0 = all."""
    eval_seq_len: int = 2048
    """Tokens of an evaluation block; published numbers use 2048."""
    seed: int = 0
    """Seed of the calibration windows."""
    dtype: str = "auto"
    """Number format of the model; auto = float16 on a GPU, float32 on a CPU. Hessians are always float32."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    block_size: int = 128
    """Columns that choose their mask together (SparseGPT's lazy batch)."""
    skip_ppl_eval: bool = False
    """Measure no perplexity."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        given("model_id", self.model_id)
        given("output_dir", self.output_dir)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        n_of_m = parse_pattern(self.pattern)
        if n_of_m and abs(self.sparsity - (1 - n_of_m[0] / n_of_m[1])) > 1e-6:
            raise ValueError(f"sparsity must be {1 - n_of_m[0] / n_of_m[1]:g} for pattern {self.pattern}, got {self.sparsity}")
        if n_of_m and self.block_size % n_of_m[1]:
            raise ValueError(f"block_size must be a multiple of {n_of_m[1]} for pattern {self.pattern}, got {self.block_size}")
        one_of("method", self.method, METHODS)
        one_of("dtype", self.dtype, DTYPES)
        at_least("nsamples", self.nsamples, 1)
        at_least("seq_len", self.seq_len, 2)
        at_least("eval_blocks", self.eval_blocks, 0)
        at_least("eval_seq_len", self.eval_seq_len, 2)
        at_least("block_size", self.block_size, 1)
        above("damping", self.damping, 0)
        check_model_id(self.model_id)
        check_data("calibration_data", self.calibration_data)
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
            check_held_out("calibration_data", self.calibration_data, self.eval_data)
        check_new("output_dir", self.output_dir)
        if self.mask_file:
            check_new("mask_file", self.mask_file)
            if Path(self.mask_file).resolve().is_relative_to(Path(self.output_dir).resolve()):
                raise ValueError(f"mask_file must lie outside output_dir {self.output_dir}, got {self.mask_file}")
