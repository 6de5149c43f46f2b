"""Print the project's dependencies and those of the extras named, for pip: `python requirements.py gcs s3`.

What pip installs depends on these lines alone: neither the code nor a linter's settings in pyproject.toml install anew.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*project["dependencies"], *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]), sep="\n")
