"""Try again what fails only for a while: a server that is busy or being restarted, a connection that breaks.

KFP 2.17 starts a stage anew when its pod is lost, not when it exits with an error, so that such faults must not end a stage.
Everything else fails at once.
"""

from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from components.core.errors import VALUE, one_line
from components.core.progress import log

T = TypeVar("T")
TRIES = 6
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds; each pause is twice the one before, a minute in all
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses


class TransientError(OSError):
    """A fault that may be gone when the same request is sent again."""


def retried(call: Callable[[], T]) -> T:
    """What `call` returns, called again after a TransientError, with a line each time.

    Raises:
        TransientError: the last try failed too.
    """

    def say(state: RetryCallState) -> None:
        assert state.outcome is not None
        error, pause = state.outcome.exception(), state.upcoming_sleep
        log(f"trying again in {pause:.0f} s ({state.attempt_number} of {TRIES - 1}): {one_line(error, 2 * VALUE)}")

    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
        before_sleep=say,
        reraise=True,
    )
    return retrying(call)
