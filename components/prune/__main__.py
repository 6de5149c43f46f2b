"""Run the prune stage from a shell: `python -m components.prune --dense_model … --output_dir …`."""

from components.core.cli import main
from components.prune.config import PruneConfig

if __name__ == "__main__":
    main(PruneConfig, "components.prune.stage")
