"""What a local run prints, and what it keeps for its log file."""

import io
import logging

from kfp.local.logging_utils import local_logger_context

from pipelines.transcript import copy, log_file, own_lines

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


def test_everything_goes_to_the_file(tmp_path):
    """The last line lacks its end; what an earlier run wrote stays."""
    terminal = io.StringIO()
    (tmp_path / "run.log").write_text("earlier\n")
    with log_file(tmp_path / "run.log") as log:
        print("header of kfp.local")
        copy([*PRINTED.splitlines(keepends=True), "last words"], log, terminal)
        with local_logger_context():
            pass
        logging.error("of another task")
    assert terminal.getvalue().startswith("[PPL] before_pruning=29.6018\n")
    assert terminal.getvalue().endswith("\nlast words\n")
    assert (tmp_path / "run.log").read_text() == f"earlier\nheader of kfp.local\n{PRINTED}last words\nof another task\n"
