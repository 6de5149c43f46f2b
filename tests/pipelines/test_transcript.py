"""What a local run prints, and what it keeps for its log file."""

import io
import sys

import pytest
from kfp.local import subprocess_task_handler

from pipelines.transcript import own_lines, transcript

PRINTED = """[KFP Executor 2026-11-24 12:00:00,000 INFO]: Looking for component `prune` in --component_module_path `/tmp/x.py`
[KFP Executor 2026-11-24 12:00:00,001 INFO]: Got executor_input:
{
    "inputs": {
        "parameterValues": {}
    }
}
[PPL] before_pruning=29.6018

[KFP Executor 2026-11-24 12:00:01,000 WARNING]: retrying in 1 s
Traceback (most recent call last):
ValueError: sparsity must be in [0, 1), got 1.3
"""


def test_the_stages_own_lines_remain_and_so_do_warnings():
    assert [line.rstrip() for line in own_lines(PRINTED.splitlines(keepends=True))] == [
        "[PPL] before_pruning=29.6018",
        "[KFP Executor 2026-11-24 12:00:01,000 WARNING]: retrying in 1 s",
        "Traceback (most recent call last):",
        "ValueError: sparsity must be in [0, 1), got 1.3",
    ]


@pytest.mark.parametrize("code", [0, 3])
def test_everything_goes_to_the_file_and_the_exit_code_comes_back(tmp_path, code):
    """The last line lacks its end, and one is not UTF-8."""
    terminal = io.StringIO()
    program = f"import sys; sys.stdout.buffer.write({PRINTED!r}.encode() + b'\\xff\\nlast words'); sys.exit({code})"
    with transcript(tmp_path / "run" / "run.log", terminal):
        print("header of kfp.local")
        command = [sys.executable, "-c", program, "--function_to_execute", "prune"]
        assert subprocess_task_handler.run_local_subprocess(command) == code
    assert terminal.getvalue().startswith("== prune\n[PPL] before_pruning=29.6018\n")
    assert terminal.getvalue().endswith("\ufffd\nlast words\n")
    logged = (tmp_path / "run" / "run.log").read_text()
    assert logged == f"header of kfp.local\n{PRINTED}\ufffd\nlast words\n"


def test_kfp_local_is_left_as_it_was(tmp_path):
    before = subprocess_task_handler.run_local_subprocess
    with pytest.raises(RuntimeError), transcript(tmp_path / "run.log", io.StringIO()):
        raise RuntimeError("a stage failed")
    assert subprocess_task_handler.run_local_subprocess is before
