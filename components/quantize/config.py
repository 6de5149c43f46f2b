"""Settings of the quantize stage."""

from dataclasses import dataclass, field
from pathlib import Path

from components.core.checks import check_not_empty, check_one_of
from components.core.corpus import WIKITEXT2, check_data, check_held_out
from components.core.files import check_new
from components.core.settings import INPUT, OUTPUT, CalibrationSettings, DeviceSettings, EvalSettings, ModelSettings, Settings

FORMATS = ("int8", "fp8", "packed-int8", "packed-int4")
PACKED = ("packed-int8", "packed-int4")
ROUNDINGS = ("auto", "nearest", "gptq")
EMBEDDINGS = ("int8", "16bit")


@dataclass(frozen=True, kw_only=True)
class FormatsSettings(Settings):
    """Formats that a pipeline quantizes to, with one quantize stage per format, run in parallel."""

    formats: list[str] = field(default_factory=lambda: ["int8", "fp8"])
    """Formats to quantize to, in parallel: int8, fp8, packed-int8, packed-int4."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.formats:
            raise ValueError(f"formats must name at least one format, got {self.formats}")
        for name in self.formats:
            check_one_of("formats", name, FORMATS)


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(CalibrationSettings, EvalSettings, ModelSettings):
    """How to quantize."""

    rounding: str = "auto"
    """How weights of the packed formats are rounded: `nearest`, each by itself; `gptq`, so that the layers' outputs for the
    calibration text change little; or `auto`, which is gptq for packed-int4. Other formats round to the nearest."""
    embedding: str = "int8"
    """Embedding and head of the packed formats: `int8`, with a scale for each row, or `16bit`. In other formats they are not
    quantized."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("rounding", self.rounding, ROUNDINGS)
        check_one_of("embedding", self.embedding, EMBEDDINGS)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(QuantizeSettings, DeviceSettings):
    """Quantize the weights of the linear layers."""

    model_dir: str = field(metadata=INPUT)
    """Folder with the checkpoint to quantize."""
    output_dir: str = field(metadata=OUTPUT)
    """Folder to create for the quantized checkpoint and quantize_stats.json."""
    format: str = "int8"
    """`int8` or `fp8` (e4m3), both symmetric with one scale per row; `packed-int8` or `packed-int4`, the kept weights of a
    pruned model alone, which this project loads."""
    mask_file: str = field(default="", metadata=INPUT)
    """The checkpoint's sparsity mask; without one, the weights that are already zero must stay zero."""
    calibration_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for calibration, which gptq reads."""
    eval_data: str = field(default=WIKITEXT2, metadata=INPUT)
    """Corpus spec or tokens folder for perplexity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_dir", self.model_dir)
        check_not_empty("output_dir", self.output_dir)
        check_one_of("format", self.format, FORMATS)

    def by_gptq(self) -> bool:
        """Whether weights are rounded by GPTQ."""
        return (self.rounding == "gptq" and self.format in PACKED) or (self.rounding == "auto" and self.format == "packed-int4")

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        if self.mask_file and not Path(self.mask_file).exists():
            raise ValueError(f"mask_file must exist, got {self.mask_file}")
        if not self.skip_ppl_eval:
            check_data("eval_data", self.eval_data)
        if self.by_gptq():
            check_data("calibration_data", self.calibration_data)
            if not self.skip_ppl_eval:
                check_held_out("calibration_data", self.calibration_data, self.eval_data)
        check_new("output_dir", self.output_dir)
