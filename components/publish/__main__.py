"""The publish stage from a shell: `python -m components.publish`."""

from components.core.cli import main
from components.publish.config import PublishConfig

if __name__ == "__main__":
    main(PublishConfig, "components.publish.stage")
