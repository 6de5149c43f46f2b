"""Settings of the report stage."""

from dataclasses import dataclass
from pathlib import Path

from components.core.checks import check_not_empty
from components.core.files import check_new
from components.core.history import stats_file
from components.core.settings import Settings

RECORD_FILES = stats_file("*")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Write one HTML page about a compressed model from its stages' records."""

    records: list[str]
    """Stage records (<stage>_stats.json) or folders that contain them, such as checkpoints; duplicates count once."""
    output_dir: str
    """Folder to create for report.html and summary.json."""
    title: str = "Model compression report"
    """Heading of the page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_empty("output_dir", self.output_dir)
        check_not_empty("title", self.title)

    def check_environment(self) -> None:
        """See `Settings`."""
        super().check_environment()
        record_files(self.records)
        check_new("output_dir", self.output_dir)


def record_files(records: list[str]) -> list[Path]:
    """The files that `records` name, in that order and without duplicates; those in a folder are sorted by name.

    Raises:
        ValueError: `records` is empty, or names a file that does not exist or a folder without records.
    """
    if not records:
        raise ValueError(f"records must name at least one record, got {records}")
    files: dict[Path, None] = {}
    for record in records:
        check_not_empty("records", record)
        path = Path(record)
        found = sorted(path.glob(RECORD_FILES)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"records must name files or folders that hold {RECORD_FILES}, got {record}")
        for file in found:
            if not file.is_file():
                raise ValueError(f"records must name existing files or folders, got {file}")
            files[file.resolve()] = None
    return list(files)
