"""Log lines and progress that read well in a terminal and in the KFP UI."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from components.core.errors import SECRETS

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def log(line: str, by_any: bool = False) -> None:
    """Print one plain line and flush it, so that a pod's log shows it immediately.

    Args:
        line: the text.
        by_any: whether a process of another rank than 0 prints too, because it alone knows of it.
    """
    if os.environ.get("RANK", "0") != "0" and not by_any:
        return
    tqdm.write(SECRETS.sub("***", line), file=sys.stdout)
    sys.stdout.flush()


def log_perplexity(name: str, value: float, prefix: str = "") -> None:
    """Print the `[PPL]` line that people grep for, e.g. `[PPL] before_pruning=29.6018`."""
    log(f"[PPL] {prefix}{name}={value:.4f}")


def track(items: Iterable[T], what: str, total: int, note: Callable[[], str] = lambda: "") -> Iterator[T]:
    """Yield `items`, showing how many are done and the time left.

    A terminal gets a progress bar; a log gets a plain line every few seconds, without control characters.

    Args:
        items: the work items; may end before `total`.
        what: name of the work, shown with the progress.
        total: how many items there are.
        note: returns further text; called for each update.
    """
    if sys.stderr.isatty():
        with tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / done * (total - done)
            log(
                f"{what}: {done}/{total}, {clock(now - start)} spent, {clock(left)} left"
                + (f"; {said}" if (said := note()) else "")
            )


def quiet_bars() -> contextlib.AbstractContextManager[object]:
    """Hide progress bars that libraries draw even if there is no terminal."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    return str(tqdm.format_interval(seconds))
