"""Which folders are in use: told by a lock that ends with its process, however that process dies.

The lock is `flock` on a file in the folder. Process ids would not do: in another pod or on another host they mean nothing, and
they are given anew. On NFS the lock holds between hosts; on a volume that does not share locks, within a host. Where there are
no locks at all, nothing counts as unused.
"""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from components.core.progress import log

LOCK = ".lock"
NOTE = 300  # characters of a holder's note that are shown


def use(folder: Path) -> TextIO | None:
    """Mark an existing folder as in use, together with other processes, until the result is closed or this process ends.

    Returns:
        the lock, or None if the folder does not exist or is being removed at this moment.
    """
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # no locks here, so nobody will remove the folder either
        return file
    try:
        if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
            return file
    except FileNotFoundError:  # removed between opening and locking
        pass
    file.close()
    return None


def remove_unused(folders: Iterable[Path]) -> None:
    """Remove the folders that no process uses: what processes that were killed left behind."""
    for folder in folders:
        with contextlib.suppress(OSError):  # in use, there are no locks here, or another user's
            with (folder / LOCK).open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            folder.rmdir()  # on NFS, which keeps an open file, it is still there


@contextlib.contextmanager
def turn(file: Path, what: str) -> Iterator[None]:
    """Do some work alone: one process after another, in the block.

    Args:
        file: what they lock, in an existing folder; it is created if it does not exist.
        what: the work, for the log of a process that waits.
    """
    with file.open("a+", encoding="utf-8") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{what}: waiting for another run that does it at the moment")
            fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            log(f"{file} cannot be locked, so a second run there would not be noticed: {error}")
        yield


@contextlib.contextmanager
def only_user(parameter: str, folder: Path, note: str) -> Iterator[None]:
    """Have a folder alone while the block runs; the folder is created if it does not exist.

    Args:
        parameter: name of the setting, for the error message.
        folder: the folder; a small file in it names its user.
        note: what the user does with it, for the error message of others.

    Raises:
        ValueError: another process has the folder; names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(NOTE) or "a process that has just started"
            raise ValueError(f"{parameter} must not be in use by another run, {folder} is used by {holder}") from error
        except OSError as error:
            log(f"{folder} cannot be locked, so a second run there would not be noticed: {error}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, {note}")
        file.flush()
        yield
