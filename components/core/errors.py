"""What a user is told when something is wrong: one line, not too long, without secrets."""

import contextlib
import errno
import re
from collections.abc import Iterator

LINE = 500  # characters of a line
VALUE = 120  # characters of a value within it
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{10,}"  # a token of the Hugging Face hub
    r"|((?<=://)|(?<=:/))[^/\s@'\"]+(?=@)"  # user and password in an address, of which a path keeps one slash
    r"|(?i:(?<=token=)|(?<=key=)|(?<=password=)|(?<=secret=)|(?<=signature=)|(?<=credential=))[^&\s'\"]+"
)


def one_line(text: object, length: int = LINE) -> str:
    """A text in one line of at most `length` characters, the middle left out if it is longer, and secrets masked."""
    line = SECRETS.sub("***", " ".join(str(text).split()))
    if len(line) <= length:
        return line
    end = length // 3
    return f"{line[: length - end - 3]} … {line[-end:]}"


def shown(value: object) -> str:
    """A value as an error shows it: quoted, in one line, shortened, secrets masked."""
    return one_line(repr(value), VALUE)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn whatever a library raises at a file that it cannot use into a ValueError.

    Libraries raise errors of any type at damaged files, even ones from outside Python (a panic in Rust). An error of the
    operating system, such as a missing permission or a full disk, stays what it is.

    Args:
        what: the start of the message: parameter or file, and rule.

    Raises:
        ValueError: in place of any other error.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the latter at a place beyond a file's end
            raise
        raise ValueError(f"{what}: {one_line(error, LINE // 2) or type(error).__name__}") from error
