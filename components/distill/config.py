"""Settings of the distill stage."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.core.checks import (
    check_above,
    check_at_least,
    check_in_unit_interval,
    check_not_empty,
    check_one_of,
    check_range,
)
from components.core.corpus import WIKITEXT2, check_data, check_held_out
from components.core.files import check_folder, check_new
from components.core.models import check_model_id
from components.core.reading import read_json
from components.core.settings import (
    EXECUTION,
    INPUT,
    OUTPUT,
    START,
    BlockSettings,
    DeviceSettings,
    EvalSettings,
    ModelSettings,
)
from components.core.storage import check_place, check_writable, is_bucket

BACKENDS = ("none", "fsdp", "deepspeed")
LAUNCHERS = ("python", "torchrun", "accelerate")
MASKS = ("fixed", "admm")
NOT_IN_PIPELINES = {
    "mix_data": "a second corpus would have to be resolved and tokenized like the first",
    "mix_ratio": "only used with mix_data",
    "no_mask": "a control for comparisons: its result is not sparse, so no later stage would accept it",
    "max_grad_norm": "expert setting",
    "global_batch": "follows from batch_size, grad_accum_steps and the number of processes",
    "checkpoint_steps": "expert setting",
    "keep_checkpoints": "expert setting",
    "tensorboard_dir": "a pod's disk is lost with the pod; the report plots the curves",
}


@dataclass(frozen=True, kw_only=True)
class DistillSettings(BlockSettings, EvalSettings, ModelSettings):
    """How to distil."""

    epochs: int = 1
    """Passes over the training blocks."""
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 = no limit."""
    batch_size: int = field(default=0, metadata=EXECUTION)  # only the blocks of an optimizer step affect the result
    """Training blocks per forward pass; 0 = 1 on a CPU, and on a GPU as many of grad_accum_steps as fit, by what the first
    steps take."""
    grad_accum_steps: int = field(default=8, metadata=EXECUTION)
    """Forward passes per optimizer step; for batch_size 0, training blocks per optimizer step."""
    global_batch: int = field(default=0, metadata=EXECUTION)
    """Training blocks per optimizer step over all processes; if set, it determines grad_accum_steps, so that a run can resume
    with a different number of processes. 0 = max(batch_size, 1) * grad_accum_steps * processes."""
    learning_rate: float = 2e-5
    """Peak learning rate of the cosine schedule (AdamW)."""
    warmup_ratio: float = 0.1
    """Fraction of the steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, in [0, 1]."""
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped, after masking."""
    alpha_kd: float = 0.7
    """Weight of the distillation term in alpha_kd * KL + (1 - alpha_kd) * CE, in [0, 1]."""
    alpha_hidden: float = 0.0
    """Weight of a third term, the relative error of the student's hidden states after each block (as in SquareHead, Kurtic et
    al., 2023); the teacher then has no cache. 0 = none."""
    temperature: float = 1.0
    """Softens both distributions in the KL term, which is scaled by its square (Hinton et al., 2015); in [0.1, 100]."""
    kl_direction: str = "forward"
    """`forward`: KL(teacher || student); `reverse`: KL(student || teacher)."""
    mix_ratio: float = 0.5
    """Fraction of the training blocks that come from mix_data."""
    no_mask: bool = False
    """Train all weights of the masked layers, not only those that the mask keeps: a dense control for fair comparisons."""
    backend: str = field(default="none", metadata=EXECUTION)
    """`none` (one process), `fsdp` or `deepspeed`."""
    launcher: str = field(default="python", metadata=START)
    """What starts the processes: `python` (a single one), `torchrun` or `accelerate`. Ignored if they are already running."""
    nproc_per_node: int = field(default=1, metadata=START)
    """Processes to start on each machine, one per GPU."""
    master_port: int = field(default=29500, metadata=START)
    """Port for the rendezvous of the processes."""
    deepspeed_config: str = field(default="", metadata=INPUT)
    """DeepSpeed JSON file with ZeRO stage 0, 1 or 2; empty = the bundled file, which uses ZeRO 2."""
    sync_each_batch: str = field(default="auto", metadata=EXECUTION)
    """With backend fsdp, add up the gradients of all processes after each forward pass (`always`) or once an optimizer step
    (`never`), which is faster but holds whole gradients on each process; `auto`: once if an eighth of a GPU holds them."""
    gradient_checkpointing: bool = field(default=False, metadata=EXECUTION)
    """Keep fewer activations and recompute them in the backward pass."""
    teacher_cache: str = "auto"
    """Cache the teacher's final hidden states on disk: `auto` (if there is more than one epoch and alpha_hidden is 0),
    `always` or `never`."""
    checkpoint_steps: int = field(default=50, metadata=EXECUTION)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = field(default=2, metadata=EXECUTION)
    """How many checkpoints to keep."""
    keep_best: bool = False
    """Save the weights of the epoch with the lowest perplexity instead of the last ones."""
    patience: int = 0
    """Stop after this many epochs without a lower perplexity; 0 = never."""
    mask: str = "fixed"
    """Which weights the student keeps: `fixed`, those of the mask that is given; or `admm` (Lee et al., 2026), as many of each
    matrix as the mask keeps, which are chosen while all weights train, beginning with the teacher's."""
    admm_penalty: float = 0.01
    """With mask admm, the weight of the squared distance between all weights and those that are kept, in the loss."""
    admm_interval: int = 32
    """With mask admm, optimizer steps after which the weights to keep are chosen anew."""
    sparse_check_eps: float = 0.0
    """Largest magnitude of a pruned weight that the checks before and after training accept; 0 = exactly zero."""
    fail_on_sparse_violation: bool = True
    """Fail if either check fails; otherwise stray weights are set to zero at the start and the last check is only recorded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for parameter in ("epochs", "grad_accum_steps", "nproc_per_node", "checkpoint_steps", "keep_checkpoints"):
            check_at_least(parameter, getattr(self, parameter), 1)
        check_at_least("admm_interval", self.admm_interval, 1)
        for parameter in ("max_steps", "batch_size", "global_batch", "weight_decay", "sparse_check_eps", "patience"):
            check_at_least(parameter, getattr(self, parameter), 0)
        check_at_least("alpha_hidden", self.alpha_hidden, 0)
        for parameter in ("learning_rate", "max_grad_norm", "temperature", "admm_penalty"):
            check_above(parameter, getattr(self, parameter), 0)
        check_range("temperature", self.temperature, 0.1, 100)
        check_in_unit_interval("weight_decay", self.weight_decay)
        check_in_unit_interval("alpha_kd", self.alpha_kd)
        check_in_unit_interval("warmup_ratio", self.warmup_ratio)
        check_one_of("kl_direction", self.kl_direction, ("forward", "reverse"))
        check_one_of("backend", self.backend, BACKENDS)
        check_one_of("launcher", self.launcher, LAUNCHERS)
        for parameter in ("teacher_cache", "sync_each_batch"):
            check_one_of(parameter, getattr(self, parameter), ("auto", "always", "never"))
        if self.alpha_hidden and self.teacher_cache == "always":
            raise ValueError(f"alpha_hidden must be 0 for teacher_cache always, got {self.alpha_hidden}")
        check_one_of("mask", self.mask, MASKS)
        if self.mask == "admm" and self.no_mask:
            raise ValueError("mask must be fixed for no_mask, got admm")
        if self.mask == "admm" and self.backend == "deepspeed":
            raise ValueError("backend must be none or fsdp for mask admm, got deepspeed: its engine takes the steps by itself")
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
        if self.deepspeed_config and self.backend != "deepspeed":
            raise ValueError(f"deepspeed_config must be empty for backend {self.backend}, got {self.deepspeed_config}")

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
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

    def step_blocks(self, processes: int = 1) -> int:
        """Training blocks per optimizer step over some processes."""
        return max(1, self.batch_size) * self.grad_accum_steps * processes

    def caches_teacher(self) -> bool:
        """Whether the teacher's final hidden states are cached."""
        return self.teacher_cache == "always" or (self.teacher_cache == "auto" and self.epochs > 1 and not self.alpha_hidden)

    def read_deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed settings from `deepspeed_config`, or from the bundled file if that is empty.

        Raises:
            ValueError: the file does not contain a JSON object.
        """
        return read_json(self.deepspeed_config or Path(__file__).with_name("deepspeed_zero2.json"), dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DistillSettings, DeviceSettings):
    """Distil a dense teacher into its sparse student."""

    teacher_model: str = field(metadata=INPUT)
    """The dense model: a folder, a hub id with optional @revision, or builtin:smollm2-135m."""
    student_model: str = field(metadata=INPUT)
    """Folder with the sparse checkpoint."""
    mask_file: str = field(metadata=INPUT)
    """The student's sparsity_mask.safetensors (or the older sparsity_mask.pt), or a folder that contains it."""
    output_dir: str = field(metadata=OUTPUT)
    """Folder to create for the distilled checkpoint, sparsity_mask.safetensors and distill_stats.json."""
    output_mask_file: str = field(default="", metadata=OUTPUT)
    """File outside the output folder to write the mask of the distilled checkpoint to; empty = in the output folder."""
    train_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for training."""
    eval_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for perplexity."""
    mix_data: str = field(default="", metadata=INPUT)
    """A second corpus to mix into the training blocks; empty = none."""
    checkpoint_dir: str = field(default="", metadata=OUTPUT)
    """Folder, or place in a bucket, for checkpoints, which must not be writable by others; the same command resumes from the
    newest. Empty = none."""
    tensorboard_dir: str = field(default="", metadata=OUTPUT)
    """Folder for TensorBoard files; empty = none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for parameter in ("teacher_model", "student_model", "mask_file", "output_dir"):
            check_not_empty(parameter, getattr(self, parameter))
        if is_bucket(self.checkpoint_dir):
            check_place("checkpoint_dir", self.checkpoint_dir)
        if self.backend == "deepspeed" and self.keep_best and self.checkpoint_dir:
            raise ValueError("keep_best must be off for checkpoints with backend deepspeed, got True")

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_model_id("teacher_model", self.teacher_model)
        if not Path(self.student_model).is_dir():
            raise ValueError(f"student_model must be a folder with a checkpoint, got {self.student_model}")
        if not Path(self.mask_file).exists():
            raise ValueError(f"mask_file must exist, got {self.mask_file}")
        texts = {"train_data": self.train_data} | ({"mix_data": self.mix_data} if self.mix_data else {})
        for parameter, text in texts.items():
            check_data(parameter, text)
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
            for parameter, text in texts.items():
                check_held_out(parameter, text, self.eval_data)
        check_new("output_dir", self.output_dir)
        if self.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard_dir needs its package: pip install 'sparse-distill[tensorboard]'")
        if self.output_mask_file:
            check_new("output_mask_file", self.output_mask_file)
            self.check_outside("output_mask_file")
        self.check_folders()

    def check_folders(self) -> None:
        """Check the folders that are written to while training: at its end, output_dir must still be free."""
        for parameter in ("checkpoint_dir", "tensorboard_dir"):
            folder = getattr(self, parameter)
            if parameter == "checkpoint_dir" and is_bucket(folder):
                check_writable(parameter, folder)
            elif folder:
                check_folder(parameter, folder)
                self.check_outside(parameter)

    def check_outside(self, parameter: str) -> None:
        """Raise ValueError if what a setting names lies in output_dir."""
        path = getattr(self, parameter)
        if Path(path).resolve().is_relative_to(Path(self.output_dir).resolve()):
            raise ValueError(f"{parameter} must lie outside output_dir {self.output_dir}, got {path}")
