"""Settings of the resolve stage."""

from dataclasses import dataclass

from components.core.checks import check_not_empty
from components.core.models import check_model_id
from components.core.settings import TextSettings


@dataclass(frozen=True, kw_only=True)
class ResolveConfig(TextSettings):
    """Find the commits of a model and its texts, so that later stages run again only if one of them has changed."""

    model_id: str
    """The model: hub id with optional @revision, folder, or builtin:smollm2-135m."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_id", self.model_id)

    def check_environment(self) -> None:
        """See `Settings`."""
        check_model_id("model_id", self.model_id)
        super().check_environment()
