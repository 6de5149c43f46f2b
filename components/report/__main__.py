"""The report stage from a shell: `python -m components.report --models … --output_dir …`."""

from components.core.cli import main
from components.report.config import ReportConfig

if __name__ == "__main__":
    main(ReportConfig, "components.report.stage")
