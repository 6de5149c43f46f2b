"""The command line of a stage, built from its settings class."""

import contextlib
import importlib
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from simple_parsing import ArgumentParser, DashVariant

from components.core.errors import LINE, SECRETS, one_line
from components.core.progress import log
from components.core.settings import naming


class _Parser(ArgumentParser):
    def error(self, message: str) -> Any:
        """End the program with one line instead of the whole usage."""
        fail(ValueError(f"{message}; --help lists all flags"))


def parse(config_class: type, description: str | None = None) -> Any:
    """Read `config_class` from the command line; an invalid value ends the program with a one-line error."""
    parser = _Parser(add_option_string_dash_variants=DashVariant.UNDERSCORE, description=description)
    arguments = parser.add_arguments(config_class, dest="config")
    # a stage's own settings first, then the ones that it shares with other stages
    depth = {name: depth for depth, base in enumerate(config_class.__mro__) for name in inspect.get_annotations(base)}
    arguments.fields.sort(key=lambda entry: depth[entry.name])
    with errors_in_one_line():
        for argument in sys.argv[1:]:
            flag, sign, value = argument.partition("=")
            if sign and value == "--":  # argparse would take it for a list of no values
                raise ValueError(f"{flag.lstrip('-')} must have a value, got {value!r}")
        return parser.parse_args().config


def main(config_class: type, stage: str) -> None:
    """Run the `run` function of the module `stage` with settings from the command line."""
    run(lambda: parse(config_class), stage)


def run(read: Callable[[], Any], stage: str) -> None:
    """Run the `run` function of the module `stage` with the settings that `read` returns.

    The module is imported after the settings have been checked, so that a wrong value is reported immediately. SIGTERM,
    which stops a pod, ends the program like an exception, so that no half-written output is left behind.
    """
    if threading.current_thread() is threading.main_thread():
        # there is nothing to clean up yet, and the library that reads settings catches SystemExit
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    with errors_in_one_line():
        config = read()
        stop_at_sigterm()
        with naming(config):
            config.check_environment()
            record = importlib.import_module(stage).run(config)
        log("  ".join(f"{name}={value}" for name, value in record.measured.items()))


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the program with one line at a wrong value, a file that cannot be used or a missing package."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if _stopped_by:  # a library that was being imported has turned `SystemExit` into an error of its own
            raise SystemExit(128 + _stopped_by[0]) from error
        fail(error)


def stop_at_sigterm() -> None:
    """Make SIGTERM end the program like an exception; by default, the first process of a container ignores it."""
    if threading.current_thread() is threading.main_thread():  # only this thread may set a handler
        signal.signal(signal.SIGTERM, _stop)
        sys.unraisablehook = _stop_after_all


_stopped_by: list[int] = []  # the signal that has asked this process to end


def _stop(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second SIGTERM must not interrupt the clean-up
    _stopped_by.append(number)
    raise SystemExit(128 + number)


def _stop_after_all(ignored: "sys.UnraisableHookArgs") -> None:
    """Stop again where the exception of `_stop` was lost: Python ignores what is raised in a finalizer."""
    if isinstance(ignored.exc_value, SystemExit):
        signal.signal(signal.SIGTERM, _stop)
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()  # when the finalizer has ended
    else:
        sys.__unraisablehook__(ignored)


def fail(error: Exception) -> NoReturn:
    """End the program with a one-line error, preceded by the traceback if COMPRESS_DEBUG is set."""
    if os.environ.get("COMPRESS_DEBUG"):
        print(SECRETS.sub("***", "".join(traceback.format_exception(error))), file=sys.stderr)
    print(f"error: {one_line(error, LINE - len('error: '))}", file=sys.stderr, flush=True)
    raise SystemExit(2)
