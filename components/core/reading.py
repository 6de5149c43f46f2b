"""Read small files that come from outside: limits, and a shape that JSON must have."""

import functools
import math
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from components.core.errors import shown

T = TypeVar("T")
LARGEST = 64 * 2**20  # bytes; the records of very long runs have a few


def read_limited(path: str | Path, largest: int = LARGEST) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: it is not an ordinary file (a device never ends), or is too large.
        OSError: it does not exist or cannot be read.
    """
    file = Path(path)
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} must be an ordinary file")
    if about.st_size > largest:
        raise ValueError(f"{path} must have at most {largest} bytes, it has {about.st_size}")
    return file.read_bytes()


def read_json(path: str | Path, shape: type[T]) -> T:
    """Read a JSON file.

    Args:
        path: the file.
        shape: what it must hold: a type or a TypedDict. No type is converted to another, such as text to a number.

    Raises:
        ValueError: it is not JSON of that shape; the message names the file and the first fault.
        OSError: it does not exist or cannot be read.
    """
    return parse_json(read_limited(path), str(path), shape)


def parse_json(text: str | bytes, what: str, shape: type[T]) -> T:
    """Parse JSON. Arguments and errors as for `read_json`; `what` is its name in messages."""
    try:
        # an argument of a command may hold bytes that are not UTF-8: with them restored, the parser says so
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        _check_finite(from_json(data, allow_inf_nan=False))
        value: T = _adapter(shape).validate_json(data, strict=True)  # type: ignore[arg-type]
        return value
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise ValueError(f"{what} must be JSON of its form, {where}: {first['msg']}, got {shown(first['input'])}") from error
    except ValueError as error:
        raise ValueError(f"{what} must be JSON: {error}") from error


def _check_finite(value: Any) -> None:
    """Raise ValueError at a number such as 1e999, which is read as infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"numbers must be finite, got {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(part)


_adapter = functools.cache(TypeAdapter)  # it takes a while to make one
