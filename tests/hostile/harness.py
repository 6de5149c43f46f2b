"""What all kinds of hostile cases share: stages as forked processes, verdicts, and workers that run the cases.

A stage is run as `python -m components.<stage>` runs it, but forked from a process that has imported everything already, so
that a case takes a fraction of a second instead of ten.
"""

import contextlib
import importlib
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

from components.core import cli
from components.core.files import UNFINISHED

LINE = 500  # characters that an error may have
# within which wrong input must be refused: seconds of the processor, since cases run side by side on machines of any speed, and
# bytes of the whole process
SECONDS, MEMORY = 10.0, 2e9
TIMEOUT = 60.0  # seconds after which a stage hangs
CASE_TIMEOUT = 300.0  # and a case


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), what it printed, processor seconds and bytes that it used."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Case:
    """One hostile case.

    Attributes:
        name: what is done, enough to do it again.
        run: does it in an empty folder of its own; returns what was wrong, or None.
    """

    name: str
    run: Callable[[Path], str | None]


@dataclass(frozen=True)
class Kind:
    """A kind of cases.

    Attributes:
        cases: makes so many cases, given the prepared inputs and a source of randomness.
        whole, short: how many cases the whole suite and its short form have.
    """

    cases: Callable[[Any, Random, int], Iterable[Case]]
    whole: int
    short: int


class Running:
    """A stage that runs in a forked process.

    Args:
        module: what `python -m` would be given.
        arguments: its command line.
        place: working directory; what the process prints is kept in a folder beside it.
        before: called in the new process before anything else.
    """

    def __init__(self, module: str, arguments: Iterable[str], place: Path, before: Callable[[], object] = lambda: None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="said-"))
        for name in ("out", "err"):
            (self.folder / name).touch()
        self.start = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(module, list(arguments), place, before)

    def _run(self, module: str, arguments: list[str], place: Path, before: Callable[[], object]) -> None:
        code = 70
        try:
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.folder / name, os.O_WRONLY), number)
            sys.stdout = open(1, "w", closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="replace")  # noqa: SIM115
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.chdir(place)
            before()
            sys.argv = [module, *arguments]
            code = _exit_code(lambda: runpy.run_module(module, run_name="__main__"))
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Wait for the end; a process that hangs is killed with its group, and its exit code is -9."""
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self.start > timeout:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                timeout = float("inf")
            time.sleep(0.002)
        seconds = usage.ru_utime + usage.ru_stime
        said = [(self.folder / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        shutil.rmtree(self.folder)
        return Ended(os.waitstatus_to_exitcode(status), *said, seconds, usage.ru_maxrss * 1024)


def _exit_code(work: Callable[[], object]) -> int:
    """The exit code that the interpreter would end with."""
    try:
        work()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line."""
    made: list[str] = []
    for name, value in settings.items():
        made += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return made


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def stage(name: str, settings: Mapping[str, Any], place: Path, **options: Any) -> Ended:
    """Run a stage to its end."""
    return Running(f"components.{name}", flags(settings), place, **options).wait()


def memory() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def config_of(stage: str) -> Any:
    """The settings class of a stage's shell."""
    return getattr(importlib.import_module(f"components.{stage}.config"), f"{stage.title()}Config")


def stage_here(name: str, settings: Mapping[str, Any]) -> Ended:
    """Run a stage to its end in this process, as its shell would with these settings; many times faster than `stage`."""
    config_class = config_of(name)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        start = time.process_time()
        try:
            code = _exit_code(lambda: cli.run(lambda: config_class(**settings), f"components.{name}.stage"))
        finally:
            seconds = time.process_time() - start
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        said = [file.seek(0) or file.read() for file in (out, err)]
    return Ended(code, *said, seconds, memory())


def refusal(ended: Ended, *names: str) -> str | None:
    """What is wrong with a refusal, which must be one line that holds one of the names, exit code 2, soon and small."""
    lines = ended.err.splitlines()
    if ended.code != 2:
        return f"exit code {ended.code}: {ended.err[-300:]!r}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"not one line: {ended.err[:300]!r}"
    if len(lines[0]) > LINE:
        return f"a line of {len(lines[0])} characters: {lines[0][:200]!r}"
    if names and not any(name in lines[0] for name in names):
        return f"names none of {', '.join(names)}: {lines[0]!r}"
    return resources(ended)


def resources(ended: Ended) -> str | None:
    """Whether a process took too long or too much memory."""
    if ended.seconds > SECONDS:
        return f"took {ended.seconds:.1f} s: {ended.err[-200:]!r}"
    if ended.memory > MEMORY:
        return f"took {ended.memory / 1e9:.2f} GB: {ended.err[-200:]!r}"
    return None


def leftovers(place: Path, *expected: str, unfinished: bool = False) -> str | None:
    """What a folder holds besides what is expected there; `unfinished` work that the next run goes on with may be."""
    names = sorted(path.name for path in place.iterdir() if path.name not in expected)
    found = [name for name in names if not (unfinished and name.startswith(".output.") and name.endswith(UNFINISHED))]
    return f"left behind: {found}" if found else None


def run_cases(cases: list[Case], workers: int) -> Iterator[tuple[Case, str | None]]:
    """Run cases in forked workers; yields each with what was wrong, or None, as they end.

    A case that takes its worker down with it, or never ends, has failed; another worker goes on.
    """
    context = get_context("fork")  # a worker inherits the cases, which could not be sent to it
    waiting = iter(range(len(cases)))
    busy: dict[Connection, tuple[BaseProcess, int, float]] = {}

    def give(connection: Connection, process: BaseProcess) -> None:
        index = next(waiting, None)
        connection.send(index)
        if index is None:
            process.join()
        else:
            busy[connection] = process, index, time.monotonic()

    def hire() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(cases, theirs))
        process.start()
        theirs.close()
        give(ours, process)

    for _ in range(workers):
        hire()
    while busy:
        for connection in wait(list(busy), timeout=1):
            process, index, _ = busy.pop(connection)
            try:
                fault = connection.recv()
            except EOFError:
                process.join()
                yield cases[index], f"the worker died with exit code {process.exitcode}"
                hire()
            else:
                yield cases[index], fault
                give(connection, process)
        for process, _, start in busy.values():
            if time.monotonic() - start > CASE_TIMEOUT:
                process.kill()


def _work(cases: list[Case], connection: Connection) -> None:
    while (index := connection.recv()) is not None:
        place = Path(tempfile.mkdtemp(prefix="case-"))
        try:
            os.chdir(place)
            fault = cases[index].run(place)
        except Exception:
            fault = f"the case itself failed: {traceback.format_exc()}"
        finally:
            shutil.rmtree(place, ignore_errors=True)
        connection.send(fault)
        if memory() > MEMORY:  # the next case would be blamed
            os._exit(0)
