"""Distil on many nodes from a shell: `python -m components.distill_distributed --handover gs://… --nodes 2 …`."""

from components.core.cli import main
from components.distill_distributed.config import DistillDistributedConfig

if __name__ == "__main__":
    main(DistillDistributedConfig, "components.distill_distributed.stage")
