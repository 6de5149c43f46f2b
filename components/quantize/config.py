"""Settings of the quantize stage."""

from dataclasses import dataclass, field
from pathlib import Path

from components.core.checks import check_not_empty, check_one_of
from components.core.corpus import WIKITEXT2, check_data
from components.core.files import check_new
from components.core.settings import INPUT, OUTPUT, DeviceSettings, EvalSettings, ModelSettings, Settings

FORMATS = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class FormatsSettings(Settings):
    """Formats that a pipeline quantizes to, with one quantize stage per format, run in parallel."""

    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    """Formats to quantize to, in parallel: int8, fp8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.formats:
            raise ValueError(f"formats must name at least one format, got {self.formats}")
        for name in self.formats:
            check_one_of("formats", name, FORMATS)


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(EvalSettings, ModelSettings):
    """How to quantize."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(QuantizeSettings, DeviceSettings):
    """Quantize the weights of the linear layers; embeddings and head are not quantized."""

    model_dir: str = field(metadata=INPUT)
    """Folder with the checkpoint to quantize."""
    output_dir: str = field(metadata=OUTPUT)
    """Folder to create for the quantized checkpoint and quantize_stats.json."""
    format: str = "int8"
    """`int8` or `fp8` (e4m3), both symmetric with one scale per row."""
    mask_file: str = field(default="", metadata=INPUT)
    """The checkpoint's sparsity mask; without one, the weights that are already zero must stay zero."""
    eval_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for perplexity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_dir", self.model_dir)
        check_not_empty("output_dir", self.output_dir)
        check_one_of("format", self.format, FORMATS)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        if self.mask_file and not Path(self.mask_file).exists():
            raise ValueError(f"mask_file must exist, got {self.mask_file}")
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
        check_new("output_dir", self.output_dir)
