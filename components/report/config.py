"""Settings of the report stage."""

from dataclasses import dataclass
from pathlib import Path

from components.core.checks import check_not_empty
from components.core.files import check_new
from components.core.history import HISTORY_FILE
from components.core.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Write one HTML page about compressed models from their histories."""

    models: list[str]
    """Checkpoints to report on: folders with a compression.json. A step that several of them share is shown once."""
    output_dir: str
    """Folder to create for report.html and summary.json."""
    title: str = "Model compression report"
    """Heading of the page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError(f"models must name at least one checkpoint, got {self.models}")
        check_not_empty("output_dir", self.output_dir)
        check_not_empty("title", self.title)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        for model in self.models:
            check_not_empty("models", model)
            if not (Path(model) / HISTORY_FILE).is_file():
                raise ValueError(f"models must be folders with a {HISTORY_FILE}, got {model!r}")
        check_new("output_dir", self.output_dir)
