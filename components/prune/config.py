"""Settings of the prune stage."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from components.core.checks import check_above, check_at_least, check_not_empty, check_one_of, parse_pattern
from components.core.corpus import WIKITEXT2, check_data, check_held_out
from components.core.errors import shown
from components.core.files import check_new
from components.core.models import check_model_id
from components.core.settings import INPUT, OUTPUT, CalibrationSettings, DeviceSettings, EvalSettings, ModelSettings
from components.prune.recipe import AUTO, AUTO_NUMBER, CHOICES, EFFORTS

UNIFORM = "uniform"
ALLOCATIONS = (UNIFORM, "slope", "owl", "search")
HIGHEST = 0.95  # sparsity of a matrix whose sparsity is its own: with less of it, next to nothing passes through
QUARTERS = 4  # parts of the calibration text, by two of which allocations are compared

NOT_IN_PIPELINES = {
    "damping": "expert setting: a value that is too small is increased automatically, and logged",
    "block_size": "expert setting: it hardly changes the result",
    "expert_tokens": "expert setting: on layers of SmolLM2-135M, 16 tokens did as well as magnitude, and fewer did worse",
    "reconstruct_epochs": "expert setting: effort has values that were measured",
}
IDLE_EXPERTS = ("refuse", "magnitude")
NAME_PATTERNS = re.compile(r"[\w.*?-]+(,[\w.*?-]+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PruneSettings(CalibrationSettings, EvalSettings, ModelSettings):
    """How to prune."""

    sparsity: float = 0.7
    """Fraction of weights to remove from each linear layer (from all together, if their allocation is uneven), in [0, 1); must
    be 1 - N/M for an N:M pattern."""
    pattern: str = "unstructured"
    """`unstructured`, or N:M to keep N of every M consecutive weights in a row, e.g. 2:4."""
    allocation: str = UNIFORM
    """How the same total is distributed: `uniform` (each matrix alike), `slope` (early blocks denser), `owl` (blocks with
    outliers denser), or `search`, which tries these and denser parts of blocks. An uneven one is taken only if predictions on
    a part of the calibration text then stay closer to the dense model's than with `uniform`."""
    effort: str = "fast"
    """How much is done for the quality of the pruned model: `fast`, `balanced` or `best`. It sets method, refit, order, target,
    swaps and reconstruct, unless they are given."""
    method: str = AUTO
    """`sparsegpt` (Hessian-aware; adjusts the remaining weights to compensate), `alps` (solves the same problem better), or a
    baseline, `wanda` or `magnitude`; `auto` = by effort."""
    refit: int = AUTO_NUMBER
    """Iterations in which the kept weights are fitted to the mask; 0 = none, -1 = by effort."""
    order: str = AUTO
    """`block`: all layers of a block are pruned at a time; `sequential`: one after another, each for the inputs that those
    before it give; `auto` = by effort."""
    target: str = AUTO
    """What a layer should reproduce for its inputs in the pruned model: the output of its dense weights for them (`pruned`), or
    its output in the dense model (`dense`); `auto` = by effort."""
    swaps: int = AUTO_NUMBER
    """Rounds in which each row exchanges a kept for a removed weight where that lowers its error; 0 = none, -1 = by effort."""
    reconstruct: str = AUTO
    """`block`: train each block's kept weights to give the dense block's outputs; `none`; `auto` = by effort."""
    reconstruct_epochs: int = AUTO_NUMBER
    """Passes over the calibration text in which a block is trained; -1 = by effort."""
    damping: float = 0.01
    """What is added to an entry of the Hessian's diagonal, as a fraction of the entry or, if that is larger, of the median."""
    block_size: int = 128
    """Number of columns whose mask is chosen together (SparseGPT's lazy batch)."""
    ignore: str = ""
    """Layers to leave dense: their names in the model, separated by commas, in which * stands for anything, such as
    *.self_attn.*; empty = none."""
    idle_experts: str = "refuse"
    """What becomes of an expert of a mixture that sees fewer calibration tokens than expert_tokens: `refuse` ends the run,
    `magnitude` prunes the expert by magnitude alone; the log and the record name it."""
    expert_tokens: int = 16
    """Fewest calibration tokens of which the Hessian of an expert is made."""
    nproc_per_node: int = 1
    """Processes to start, one per GPU; they share the calibration blocks and the layers. At most nsamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        check_one_of("allocation", self.allocation, ALLOCATIONS)
        check_one_of("effort", self.effort, EFFORTS)
        for parameter, choices in CHOICES.items():
            check_one_of(parameter, getattr(self, parameter), (AUTO, *choices))
        for parameter in ("refit", "swaps"):
            check_at_least(parameter, getattr(self, parameter), AUTO_NUMBER)
        if self.reconstruct_epochs != AUTO_NUMBER:
            check_at_least("reconstruct_epochs", self.reconstruct_epochs, 1)
        check_at_least("block_size", self.block_size, 1)
        if self.ignore and not NAME_PATTERNS.fullmatch(self.ignore):
            raise ValueError(f"ignore must be names separated by commas, such as *.self_attn.*, got {shown(self.ignore)}")
        check_one_of("idle_experts", self.idle_experts, IDLE_EXPERTS)
        check_at_least("expert_tokens", self.expert_tokens, 1)
        check_at_least("nproc_per_node", self.nproc_per_node, 1)
        if self.nproc_per_node > self.nsamples:
            raise ValueError(f"nproc_per_node must be at most nsamples = {self.nsamples}, got {self.nproc_per_node}")
        check_above("damping", self.damping, 0)
        n_of_m = parse_pattern(self.pattern)
        if n_of_m and abs(self.sparsity - (1 - n_of_m[0] / n_of_m[1])) > 1e-6:
            raise ValueError(f"sparsity must be {1 - n_of_m[0] / n_of_m[1]:g} for pattern {self.pattern}, got {self.sparsity}")
        if n_of_m and self.block_size % n_of_m[1]:
            raise ValueError(f"block_size must be a multiple of {n_of_m[1]} for pattern {self.pattern}, got {self.block_size}")
        if self.allocation != UNIFORM:
            self._check_uneven(n_of_m is not None)

    def _check_uneven(self, has_pattern: bool) -> None:
        """Check that the other settings allow an allocation that is not uniform."""
        if has_pattern:
            raise ValueError(f"allocation must be {UNIFORM} for pattern {self.pattern}, got {self.allocation}")
        if self.sparsity >= HIGHEST:
            raise ValueError(f"sparsity must be below {HIGHEST} for allocation {self.allocation}, got {self.sparsity}")
        if self.nsamples < (least := QUARTERS * self.nproc_per_node):
            raise ValueError(f"nsamples must be at least {least} for allocation {self.allocation}, got {self.nsamples}")

    def ignored(self) -> list[str]:
        """The patterns of `ignore`."""
        return self.ignore.split(",") if self.ignore else []


@dataclass(frozen=True, kw_only=True)
class PruneConfig(PruneSettings, DeviceSettings):
    """Prune the weight matrices in a language model's decoder blocks in one shot."""

    dense_model: str = field(metadata=INPUT)
    """The model to prune: a folder with a dense checkpoint, a hub id with optional @revision, or builtin:smollm2-135m."""
    output_dir: str = field(metadata=OUTPUT)
    """Folder to create for the sparse checkpoint, sparsity_mask.safetensors and prune_stats.json."""
    mask_file: str = field(default="", metadata=OUTPUT)
    """File outside the output folder to write the mask to; empty = in the output folder."""
    calibration_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for calibration."""
    eval_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for perplexity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("dense_model", self.dense_model)
        check_not_empty("output_dir", self.output_dir)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_model_id("dense_model", self.dense_model)
        check_data("calibration_data", self.calibration_data)
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
            check_held_out("calibration_data", self.calibration_data, self.eval_data)
        check_new("output_dir", self.output_dir)
        if self.mask_file:
            check_new("mask_file", self.mask_file)
            if Path(self.mask_file).resolve().is_relative_to(Path(self.output_dir).resolve()):
                raise ValueError(f"mask_file must lie outside output_dir {self.output_dir}, got {self.mask_file}")
