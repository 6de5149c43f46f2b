"""Settings of the distill stage."""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from components.core.checks import DTYPES, above, at_least, given, in_unit, one_of
from components.core.corpus import WIKITEXT2, check_data, check_held_out
from components.core.files import check_new, read_json
from components.core.models import check_model_id

BACKENDS = ("none", "fsdp", "deepspeed")
LAUNCHERS = ("python", "torchrun", "accelerate")


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
    mix_data: str = ""
    """A second corpus mixed into the training blocks."""
    mix_ratio: float = 0.5
    """Share of the training blocks that come from mix_data."""
    no_mask: bool = False
    """Train all weights that the mask names, not only those it keeps: the dense control for an honest comparison."""
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
    global_batch: int = 0
    """Training blocks of an optimizer step over all processes; grad_accum_steps follows from it, so that a run whose number
    of processes changes stays the same run. 0 = batch_size * grad_accum_steps * processes."""
    learning_rate: float = 2e-5
    """Peak of the cosine schedule (AdamW)."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, after masking."""
    alpha_kd: float = 0.7
    """Weight of the distillation term in alpha_kd * KL + (1 - alpha_kd) * CE, in [0, 1]."""
    temperature: float = 1.0
    """Both distributions of the KL are softened by it; the term is scaled by its square (Hinton et al., 2015)."""
    kl_direction: str = "forward"
    """`forward`: KL(teacher || student); `reverse`: KL(student || teacher)."""
    backend: str = "none"
    """`none` (one process), `fsdp` or `deepspeed`."""
    launcher: str = "python"
    """What starts the processes: `python` (one), `torchrun` or `accelerate`. Not used where they run already."""
    nproc_per_node: int = 1
    """Processes to start, one a GPU."""
    master_port: int = 29500
    """Port where the processes meet."""
    deepspeed_config: str = ""
    """DeepSpeed JSON file with ZeRO stage 0, 1 or 2; empty = the shipped one, ZeRO 2."""
    gradient_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass."""
    teacher_cache: str = "auto"
    """Keep the teacher's hidden states on disk: `auto` (if there is more than one epoch), `always` or `never`."""
    checkpoint_dir: str = ""
    """Folder for checkpoints; the same command goes on from the newest. Let nobody else write to it. Empty = none."""
    checkpoint_steps: int = 50
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    keep_best: bool = False
    """Save the weights of the epoch with the lowest perplexity instead of the last ones."""
    patience: int = 0
    """End after so many epochs without a lower perplexity; 0 = never."""
    tensorboard_dir: str = ""
    """Folder for TensorBoard files; empty = none."""
    seed: int = 0
    """Seed of the order of the training blocks."""
    dtype: str = "auto"
    """Compute format and that of the saved model; auto = float16 on a GPU, float32 on a CPU. Weights train in float32."""
    sparse_check_eps: float = 0.0
    """In the opening and closing check a weight outside the mask may have this magnitude; 0 = exactly zero."""
    fail_on_sparse_violation: bool = True
    """Fail if one of the checks does; otherwise stray weights are set to zero at the start and the result is recorded."""
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
        for parameter in ("max_steps", "global_batch", "weight_decay", "sparse_check_eps", "eval_blocks"):
            at_least(parameter, getattr(self, parameter), 0)
        for parameter in ("learning_rate", "max_grad_norm", "temperature"):
            above(parameter, getattr(self, parameter), 0)
        for parameter in ("seq_len", "eval_seq_len"):
            at_least(parameter, getattr(self, parameter), 2)
        for parameter in ("nproc_per_node", "checkpoint_steps", "keep_checkpoints"):
            at_least(parameter, getattr(self, parameter), 1)
        at_least("patience", self.patience, 0)
        one_of("kl_direction", self.kl_direction, ("forward", "reverse"))
        one_of("backend", self.backend, BACKENDS)
        one_of("launcher", self.launcher, LAUNCHERS)
        one_of("teacher_cache", self.teacher_cache, ("auto", "always", "never"))
        if not 0 < self.mix_ratio < 1:
            raise ValueError(f"mix_ratio must be in (0, 1), got {self.mix_ratio}")
        if not 0 < self.master_port < 65536:
            raise ValueError(f"master_port must be in [1, 65535], got {self.master_port}")
        if self.nproc_per_node > 1 and (self.backend == "none" or self.launcher == "python"):
            raise ValueError(
                f"nproc_per_node must be 1 for backend {self.backend} and launcher {self.launcher}, got {self.nproc_per_node}"
            )
        if self.skip_ppl_eval and (self.keep_best or self.patience):
            raise ValueError("skip_ppl_eval must be off for keep_best and patience, got True")
        if self.backend == "deepspeed" and self.keep_best and self.checkpoint_dir:
            raise ValueError("keep_best must be off for checkpoints with backend deepspeed, got True")
        self._check_deepspeed()
        if self.mix_data:
            check_data("mix_data", self.mix_data)
        in_unit("alpha_kd", self.alpha_kd)
        in_unit("warmup_ratio", self.warmup_ratio)
        one_of("dtype", self.dtype, DTYPES)
        check_model_id(self.teacher_model, "teacher_model")
        if not Path(self.student_model).is_dir():
            raise ValueError(f"student_model must be a folder with a checkpoint, got {self.student_model}")
        if not Path(self.mask_file).exists():
            raise ValueError(f"mask_file must exist, got {self.mask_file}")
        check_data("train_data", self.train_data)
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
            check_held_out("train_data", self.train_data, self.eval_data)
            if self.mix_data:
                check_held_out("mix_data", self.mix_data, self.eval_data)
        check_new("output_dir", self.output_dir)

    def _check_deepspeed(self) -> None:
        if self.deepspeed_config and self.backend != "deepspeed":
            raise ValueError(f"deepspeed_config must be empty for backend {self.backend}, got {self.deepspeed_config}")
        if self.backend != "deepspeed":
            return
        if self.deepspeed_config and not Path(self.deepspeed_config).is_file():
            raise ValueError(f"deepspeed_config must be a JSON file, got {self.deepspeed_config}")
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("backend deepspeed needs its package: pip install 'sparse-distill[deepspeed]'")
        zero = self.read_deepspeed_config().get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
        if stage not in (0, 1, 2):
            raise ValueError(f"deepspeed_config must have zero_optimization.stage 0, 1 or 2, got {stage}: use backend fsdp")

    def flags(self, leave_out: Collection[str] = ()) -> list[str]:
        """The settings as flags of this stage's command line; a setting that is empty is left out too."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(DistillConfig) if entry.name not in leave_out}
        return [f"--{name}={value}" for name, value in values.items() if value != ""]

    def read_deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed settings: those of `deepspeed_config`, or the shipped ones.

        Raises:
            ValueError: the file is not JSON.
        """
        settings = read_json(self.deepspeed_config or Path(__file__).with_name("deepspeed_zero2.json"))
        if not isinstance(settings, dict):
            raise ValueError(f"deepspeed_config must be a JSON object, got {type(settings).__name__}")
        return settings
