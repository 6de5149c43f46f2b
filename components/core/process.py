"""Run another program until it exits."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command, forwarding SIGTERM to it.

    Raises:
        SystemExit: the command failed; the exit code is the one that a shell would report, or that of SIGTERM if it was
            forwarded: torchrun itself exits with 1 then.
    """
    processes: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []
    early: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if not processes:
            early.append(number)
        for process in processes:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)  # at once, since a command started just before would run on alone
    try:
        with subprocess.Popen(command, env=environment) as process:
            processes.append(process)
            for number in early:
                process.send_signal(number)
            code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise SystemExit(128 + signals[0] if signals else code if code > 0 else 128 - code)
