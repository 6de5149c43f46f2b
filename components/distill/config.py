"""Settings of the distill stage."""

from dataclasses import dataclass
from pathlib import Path

from components.core.checks import above, at_least, given, in_unit, one_of
from components.core.corpus import WIKITEXT2, check_data
from components.core.device import DTYPES
from components.core.files import check_new
from components.core.models import check_model_id


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distil a dense teacher into its sparse student, training only the weights that the mask keeps."""

    teacher_model: str
    """The dense model: folder, hub id with optional @revision, or builtin:smollm2-135m."""
    student_model: str
    """Folder with the sparse checkpoint."""
    mask_file: str
    """The student's sparsity_mask.safetensors (or the older sparsity_mask.pt), or a folder that holds it."""
    output_dir: str
    """Folder to create: the distilled checkpoint and distill_stats.json."""
    train_data: str = WIKITEXT2
    """Corpus spec or tokens folder for training."""
    eval_data: str = WIKITEXT2
    """Corpus spec or tokens folder for perplexity."""
    seq_len: int = 512
    """Tokens of a training block."""
    epochs: int = 1
    """Passes over the training blocks."""
    max_steps: int = 0
    """Stop after so many optimizer steps; 0 = no limit."""
    batch_size: int = 1
    """Training blocks of a forward pass."""
    grad_accum_steps: int = 8
    """Forward passes of an optimizer step."""
    learning_rate: float = 2e-5
    """Peak of the cosine schedule (AdamW)."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, after masking."""
    alpha_kd: float = 0.7
    """Weight of the distillation term in alpha_kd * KL + (1 - alpha_kd) * CE, in [0, 1]."""
    temperature: float = 1.0
    """Both distributions of the KL are softened by it; the term is scaled by its square (Hinton et al., 2015)."""
    seed: int = 0
    """Seed of the order of the training blocks."""
    dtype: str = "auto"
    """Compute format and that of the saved model; auto = float16 on a GPU, float32 on a CPU. Weights train in float32."""
    sparse_check_eps: float = 0.0
    """In the closing check a weight outside the mask may have this magnitude; 0 = exactly zero."""
    fail_on_sparse_violation: bool = True
    """Fail if the closing check does; otherwise it is only recorded."""
    eval_blocks: int = 0
    """Evaluation blocks; 0 = all."""
    eval_seq_len: int = 2048
    """Tokens of an evaluation block; published numbers use 2048."""
    skip_ppl_eval: bool = False
    """Measure no perplexity."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models."""

    def __post_init__(self) -> None:
        for parameter in ("teacher_model", "student_model", "mask_file", "output_dir"):
            given(parameter, getattr(self, parameter))
        for parameter in ("epochs", "batch_size", "grad_accum_steps"):
            at_least(parameter, getattr(self, parameter), 1)
        for parameter in ("max_steps", "weight_decay", "sparse_check_eps", "eval_blocks"):
            at_least(parameter, getattr(self, parameter), 0)
        for parameter in ("learning_rate", "max_grad_norm", "temperature"):
            above(parameter, getattr(self, parameter), 0)
        for parameter in ("seq_len", "eval_seq_len"):
            at_least(parameter, getattr(self, parameter), 2)
        in_unit("alpha_kd", self.alpha_kd)
        in_unit("warmup_ratio", self.warmup_ratio)
        one_of("dtype", self.dtype, DTYPES)
        check_model_id(self.teacher_model)
        if not Path(self.student_model).is_dir():
            raise ValueError(f"student_model must be a folder with a checkpoint, got {self.student_model}")
        if not Path(self.mask_file).exists():
            raise ValueError(f"mask_file must exist, got {self.mask_file}")
        check_data("train_data", self.train_data)
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
        check_new("output_dir", self.output_dir)
