"""The short form of the hostile suite; `python -m tests.hostile` runs all of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.__main__ import KINDS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said() -> str:
    """What the short form prints, of the same cases each time; in a process of its own, from which they can be forked."""
    command = [sys.executable, "-m", "tests.hostile", "--short", "--seed", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout


@pytest.mark.parametrize("kind", KINDS)
def test_every_hostile_case_ends_well(said, kind):
    summary = re.search(rf"^{kind}: tried (\d+), well (\d+), failed 0, \d+ s, seed \d+$", said, re.MULTILINE)
    assert summary, said
    assert int(summary[1]) == int(summary[2]) > 0
