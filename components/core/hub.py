"""Requests to the Hugging Face hub, and its errors, explained to the user."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from components.core.errors import one_line
from components.core.retry import TRANSIENT, TransientError, retried

T = TypeVar("T")


def from_hub(parameter: str, name: str, ask: Callable[[], T]) -> T:
    """What the hub answers; a request is sent again if the hub is busy or the connection breaks.

    Args:
        parameter: name of the setting, for the error message.
        name: its value.
        ask: sends the request by the hub's client.

    Raises:
        ValueError: the hub refuses or does not answer; in one line, which says what to do.
    """
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    def once() -> T:
        try:
            return ask()
        except (HTTPError, errors.LocalEntryNotFoundError) as error:
            if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
                raise
            response = getattr(error, "response", None)  # None: there was no answer
            if response is not None and response.status_code not in TRANSIENT:
                raise
            raise TransientError(f"the hub does not answer: {error}") from error

    with _explained(parameter, name):
        try:
            return retried(once)
        except TransientError as error:
            raise error.__cause__ or error from None
    raise AssertionError  # for mypy, which takes the errors for suppressed


@contextlib.contextmanager
def _explained(parameter: str, name: str) -> Iterator[None]:
    """Turn exceptions of the hub's client into a one-line ValueError that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    name = one_line(name)  # without what looks like a token
    try:
        yield
    except errors.GatedRepoError as error:
        what = "is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`"
        raise ValueError(f"{parameter} {what}, got {name}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        what = "must exist on the hub (a private one needs HF_TOKEN) or be a local folder"
        raise ValueError(f"{parameter} {what}, got {name}") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{parameter} must name an existing revision, got {name}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        what = "is not on this machine, and the hub is off or out of reach: give a local folder"
        raise ValueError(f"{parameter} {what}, got {name}") from error
    except (HTTPError, OSError) as error:
        what = f"cannot be looked up on the hub ({type(error).__name__}): check the network or give a local folder"
        raise ValueError(f"{parameter} {what}, got {name}") from error
