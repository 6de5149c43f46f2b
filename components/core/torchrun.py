"""torchrun without its own traceback: what has failed says so itself, or is named in one line.

`python -m components.core.torchrun` takes torchrun's arguments, and ends together with the process that started it.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from components.core.process import STARTED, end_with


def main() -> None:
    """Run the processes; raises SystemExit with the exit code of the first one that failed, as a shell would report it."""
    end_with(int(os.environ[STARTED]))
    logging.disable(logging.ERROR)  # it tells of every process that it ends
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from error
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {number} was ended by {name}", file=sys.stderr, flush=True)
        raise SystemExit(128 - failure.exitcode) from error
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error


if __name__ == "__main__":
    main()
