"""The fetch stage from a shell: `python -m components.fetch`."""

from components.core.cli import main
from components.fetch.config import FetchConfig

if __name__ == "__main__":
    main(FetchConfig, "components.fetch.stage")
