"""Run another program until it exits, and end together with the one that started this."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

STARTED = "STAGE_STARTED"  # the environment's variable by which `run_to_end` marks what it starts, with its own process id
GRACE_SECONDS = 120.0  # that a process has to end after SIGTERM, enough to write a checkpoint, before it is killed
POLL_SECONDS = 0.2


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command marked by `STARTED`, forwarding SIGTERM to it.

    Raises:
        SystemExit: the command failed; the exit code is the one that a shell would report, or that of SIGTERM if it was
            forwarded: torchrun itself exits with 1 then.
    """
    processes: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        for process in processes:
            process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)  # at once, since a command started just before would run on alone
    try:
        with subprocess.Popen(command, env={**environment, STARTED: str(os.getpid())}) as process:
            processes.append(process)
            for number in signals:
                process.send_signal(number)
            code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise SystemExit(128 + signals[0] if signals else code if code > 0 else 128 - code)


def end_with(parent: int) -> None:
    """Have this process end when its parent has died, whatever killed it: first by SIGTERM, then by SIGKILL.

    A thread looks every now and then. Linux could send a signal instead, but does so when the thread that started this process
    ends, not only when the parent does.

    Args:
        parent: process id of the parent. If it has died already, this process ends at once.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
