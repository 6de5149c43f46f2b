"""Settings of the fetch stage."""

from dataclasses import dataclass

from components.core.checks import given
from components.core.files import check_new
from components.core.models import check_model_id


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Fetch a dense model."""

    model_id: str
    """Hub id with optional @revision, folder, or builtin:smollm2-135m."""
    output_dir: str
    """Folder to create: the checkpoint."""
    revision: str = ""
    """What the resolve stage named: a commit of the hub, or the fingerprint that the folder must still have."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        given("model_id", self.model_id)
        given("output_dir", self.output_dir)
        check_model_id(self.model_id)
        check_new("output_dir", self.output_dir)
