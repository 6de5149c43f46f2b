"""Settings of the resolve stage."""

from dataclasses import dataclass

from components.core.checks import given
from components.core.corpus import WIKITEXT2, check_corpus
from components.core.models import check_model_id


@dataclass(frozen=True, kw_only=True)
class ResolveConfig:
    """Name the commit of a model and of its texts, so that later stages are redone only if it changed."""

    model_id: str
    """Hub id with optional @revision, folder, or builtin:smollm2-135m."""
    train_data: str = WIKITEXT2
    """Corpus spec for calibration and training."""
    eval_data: str = WIKITEXT2
    """Corpus spec for perplexity."""

    def __post_init__(self) -> None:
        given("model_id", self.model_id)
        check_model_id(self.model_id)
        check_corpus("train_data", self.train_data)
        check_corpus("eval_data", self.eval_data)
