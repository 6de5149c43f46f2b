"""Settings of the fetch stage."""

from dataclasses import dataclass

from components.core.checks import check_not_empty
from components.core.files import check_new
from components.core.models import check_model_id
from components.core.settings import CodeSettings


@dataclass(frozen=True, kw_only=True)
class FetchConfig(CodeSettings):
    """Fetch a dense model."""

    model_id: str
    """The model: hub id with optional @revision, folder, or builtin:smollm2-135m."""
    output_dir: str
    """Folder to create for the checkpoint."""
    revision: str = ""
    """Revision found by the resolve stage: a commit on the hub, or the fingerprint that a folder must still have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("model_id", self.model_id)
        check_not_empty("output_dir", self.output_dir)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        check_model_id("model_id", self.model_id)
        check_new("output_dir", self.output_dir)
