"""Settings of the evaluate stage."""

from dataclasses import dataclass

from components.core.checks import check_not_empty
from components.core.corpus import WIKITEXT2, check_data
from components.core.settings import DeviceSettings, EvalBlockSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvalBlockSettings, ModelSettings, DeviceSettings):
    """Measure perplexity by the usual convention: token-level, over non-overlapping blocks."""

    model_dir: str
    """Folder with the checkpoint: dense, sparse or quantized."""
    eval_data: str = WIKITEXT2
    """Corpus spec or tokens folder for perplexity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_dir", self.model_dir)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_data("eval_data", self.eval_data)
