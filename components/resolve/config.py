"""Settings of the resolve stage."""

from dataclasses import dataclass, fields
from typing import Any

from components.core.checks import check_not_empty
from components.core.models import check_model_id
from components.core.reading import parse_json
from components.core.settings import TextSettings


@dataclass(frozen=True, kw_only=True)
class ResolveSettings(TextSettings):
    """Which model and which texts."""

    model_id: str
    """The model: hub id with optional @revision, folder, or builtin:smollm2-135m."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_id", self.model_id)

    def check_environment(self) -> None:
        """See `Settings`."""
        check_model_id("model_id", self.model_id)
        super().check_environment()


@dataclass(frozen=True, kw_only=True)
class ResolveConfig(ResolveSettings):
    """Check a run, and find the commits of its model and texts, so that later stages run again only if one has changed."""

    parameters: str = "{}"
    """The run's other parameters, to be checked: a JSON object of name → value or its text. What is missing has its default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run_parameters()

    def run_parameters(self) -> dict[str, Any]:
        """All parameters of the run.

        Raises:
            ValueError: `parameters` is not a JSON object.
        """
        own = {entry.name: getattr(self, entry.name) for entry in fields(ResolveSettings)}
        return parse_json(self.parameters, "parameters", dict[str, Any]) | own
