"""The process of a stage on this machine: kfp's executor, which ends gracefully at SIGTERM and when `run.py` has died.

`pipelines.local_stages` starts it as `python -m pipelines.stage_process <process id of run.py> <flags of kfp's executor>`.
"""

import sys

from components.core.cli import stop_at_sigterm
from components.core.process import end_with


def main() -> None:
    """Run the stage."""
    stop_at_sigterm()
    end_with(int(sys.argv.pop(1)))
    from kfp.dsl.executor_main import executor_main  # takes a second

    executor_main()


if __name__ == "__main__":
    main()
