"""Errors of the Hugging Face hub, explained to the user."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def hub_errors(parameter: str, name: str) -> Iterator[None]:
    """Turn exceptions of the hub's client into a one-line ValueError that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

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
