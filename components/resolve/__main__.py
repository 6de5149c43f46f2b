"""The resolve stage from a shell: `python -m components.resolve`."""

from components.core.cli import main
from components.resolve.config import ResolveConfig

if __name__ == "__main__":
    main(ResolveConfig, "components.resolve.stage")
