"""The evaluate stage from a shell: `python -m components.evaluate`."""

from components.core.cli import main
from components.evaluate.config import EvaluateConfig

if __name__ == "__main__":
    main(EvaluateConfig, "components.evaluate.stage")
