"""Run the quantize stage from a shell: `python -m components.quantize`."""

from components.core.cli import main
from components.quantize.config import QuantizeConfig

if __name__ == "__main__":
    main(QuantizeConfig, "components.quantize.stage")
