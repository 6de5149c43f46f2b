"""The tokenize stage from a shell: `python -m components.tokenize`."""

from components.core.cli import main
from components.tokenize.config import TokenizeConfig

if __name__ == "__main__":
    main(TokenizeConfig, "components.tokenize.stage")
