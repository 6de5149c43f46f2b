"""Settings of the tokenize stage."""

from dataclasses import dataclass

from components.core.checks import check_not_empty
from components.core.corpus import check_held_out
from components.core.files import check_new
from components.core.settings import CalibrationSettings, CodeSettings, EvalBlockSettings, TextSettings


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings(TextSettings, CalibrationSettings, EvalBlockSettings, CodeSettings):
    """Which texts are cut into blocks, and how."""

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_held_out("train_data", self.train_data, self.eval_data)


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(TokenizeSettings):
    """Cut calibration, training and evaluation text into blocks of token ids."""

    model_dir: str
    """Folder with the tokenizer."""
    output_dir: str
    """Folder to create for tokens.safetensors."""
    train_revision: str = ""
    """Revision of train_data found by the resolve stage."""
    eval_revision: str = ""
    """Revision of eval_data found by the resolve stage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_dir", self.model_dir)
        check_not_empty("output_dir", self.output_dir)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_new("output_dir", self.output_dir)
