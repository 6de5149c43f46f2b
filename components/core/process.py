"""Run another program until it exits."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command, forwarding SIGTERM to it.

    Raises:
        SystemExit: the command failed; the exit code is the one that a shell would report.
    """
    with subprocess.Popen(command, env=environment) as process:

        def pass_on(number: int, _: FrameType | None) -> None:
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
