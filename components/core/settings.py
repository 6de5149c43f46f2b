"""What the settings classes of all stages have in common.

A stage's parameters are the fields of a frozen dataclass, each documented by the string below it. A parameter is defined
only there: its flag, its entry in the pipelines, its check and its row in the reference table all follow from it.

Values and the environment are checked separately. `__post_init__` checks the values themselves, even on a machine that only
submits runs; `check_environment` checks what the machine that does the work must have: files, folders, packages.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from components.core.checks import DTYPES, check_at_least, check_one_of, check_range, check_text
from components.core.corpus import WIKITEXT2, check_corpus
from components.core.errors import shown

ANY_GPUS = -1
MOST_SAMPLES = 65536  # calibration blocks; hundreds are usual

# Kinds of settings, passed as `field(metadata=…)` in stages where other code selects settings by kind. There, a setting without
# a kind affects the result.
INPUT = {"kind": "input"}  # names an input, which is compared by its content
OUTPUT = {"kind": "output"}  # names an output
START = {"kind": "start"}  # how processes are started
EXECUTION = {"kind": "execution"}  # how the work is carried out; does not affect the result

S = TypeVar("S")


def names_of(config_class: type, *kinds: Mapping[str, str]) -> set[str]:
    """Names of the fields of any of these kinds."""
    wanted = {kind["kind"] for kind in kinds}
    return {entry.name for entry in dataclasses.fields(config_class) if entry.metadata.get("kind") in wanted}


def configure(config_class: type[S], values: Mapping[str, Any], **bound: Any) -> S:
    """Build settings from named values.

    Args:
        config_class: the settings class.
        values: name → value, such as the `locals()` of a component; names that are not fields are ignored.
        bound: values of fields that are not taken from `values`.
    """
    names = {entry.name for entry in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return config_class(**{name: value for name, value in values.items() if name in names} | bound)


def affecting(settings: Any) -> dict[str, Any]:
    """The settings that affect a result, by name: those without a kind."""
    return {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings) if "kind" not in entry.metadata}


def flags_of(settings: Any, config_class: type, leave_out: Collection[str] = ()) -> list[str]:
    """The fields that a settings class has as command-line flags of its stage; empty values are omitted too."""
    names = [entry.name for entry in dataclasses.fields(config_class) if entry.name not in leave_out]
    return [f"--{name}={value}" for name in names if (value := getattr(settings, name)) != ""]


@contextlib.contextmanager
def naming(settings: Any) -> Iterator[None]:
    """Name the setting that an error of the operating system is about, such as a closed folder or a name that is too long.

    Raises:
        ValueError: in place of an error about a path that a setting gives, or one in it or above it.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str) or error.filename2:  # a copy tells both paths
            raise
        where = Path(error.filename).absolute()
        concerned: dict[Path, str] = {}
        for entry in dataclasses.fields(settings):
            value = getattr(settings, entry.name)
            texts = [text for text in (value if isinstance(value, list) else [value]) if text and isinstance(text, str)]
            paths = [Path(text).absolute() for text in texts]
            related = [path for path in paths if where.is_relative_to(path) or path.is_relative_to(where)]
            concerned |= dict.fromkeys(related, entry.name)
        if not concerned:
            raise
        name = concerned[max(concerned, key=lambda path: (where.is_relative_to(path), len(path.parts)))]
        raise ValueError(f"{name} cannot be used: {error.strerror}, {shown(error.filename)}") from error


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The base of all settings classes, where their chains of `super()` checks end."""

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            for text in value if isinstance(value, list) else [value]:
                check_text(entry.name, text)

    def check_environment(self) -> None:
        """Check that this machine has what the settings need: files, folders, packages. Raises ValueError."""


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """Which texts a run reads."""

    train_data: str = WIKITEXT2
    """Corpus for calibration and training: hub dataset `name:configuration`, local file or folder, or builtin:python-docs."""
    eval_data: str = WIKITEXT2
    """Corpus for perplexity; may be the same as train_data, since its evaluation split is read."""

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_corpus("train_data", self.train_data)
        check_corpus("eval_data", self.eval_data)


@dataclass(frozen=True, kw_only=True)
class FirstTokenSettings(Settings):
    """What every block of tokens begins with."""

    bos: str = "auto"
    """Whether the first token of every block is the tokenizer's beginning-of-sequence token: `always`; `never`, the convention
    of GPTQ and of published tables; or `auto`, which is always if the tokenizer itself puts it in front of a text (Gemma,
    Llama)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("bos", self.bos, ("auto", "always", "never"))


@dataclass(frozen=True, kw_only=True)
class BlockSettings(FirstTokenSettings):
    """How text is cut into blocks of tokens."""

    seq_len: int = 512
    """Tokens in a calibration or training block."""
    seed: int = 0
    """Seed of the calibration windows and of the order of the training blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("seq_len", self.seq_len, 2)
        check_range("seed", self.seed, 0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(BlockSettings):
    """How much calibration text is used."""

    nsamples: int = 64
    """Number of calibration blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("nsamples", self.nsamples, 1)
        check_range("nsamples", self.nsamples, 1, MOST_SAMPLES)


@dataclass(frozen=True, kw_only=True)
class EvalBlockSettings(FirstTokenSettings):
    """How evaluation text is cut into blocks of tokens."""

    eval_blocks: int = 0
    """Number of evaluation blocks; 0 = all."""
    eval_seq_len: int = 2048
    """Tokens in an evaluation block; published numbers use 2048."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("eval_blocks", self.eval_blocks, 0)
        check_at_least("eval_seq_len", self.eval_seq_len, 2)


@dataclass(frozen=True, kw_only=True)
class EvalSettings(EvalBlockSettings):
    """Whether perplexity is measured, and on how much text."""

    skip_ppl_eval: bool = False
    """Do not measure perplexity."""


@dataclass(frozen=True, kw_only=True)
class CodeSettings(Settings):
    """Whether a model may bring its own code."""

    trust_remote_code: bool = field(default=False, metadata=EXECUTION)
    """Run Python code that comes with the model or its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """What a stage computes on."""

    gpus: int = field(default=ANY_GPUS, metadata=EXECUTION)
    """GPUs that the stage is meant to have: fewer are an error, 0 computes on the CPU even where there are some, -1 takes
    what is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("gpus", self.gpus, ANY_GPUS)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(CodeSettings):
    """The number format in which a model is loaded."""

    dtype: str = "auto"
    """Number format of the model's weights and activations: float32, float16, bfloat16, or auto, which is bfloat16 where the
    device has it, float16 on other GPUs and float32 on a CPU (calibration text is then multiplied in bfloat16 if the CPU does
    so natively). Hessians, and weights while they are trained, are float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("dtype", self.dtype, DTYPES)
