"""Print the dependencies of the project and of the named extras for pip: `python requirements.py gcs s3`.

The image layer that pip installs depends only on this output: changes to code or linter settings do not rebuild it.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*project["dependencies"], *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]), sep="\n")
