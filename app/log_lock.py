"""Detect running trainers by a lock on the log file that a trainer writes to.

Launcher and trainer inherit the lock with the file, so it survives the application and is released when the last of
them exits. On a system without such locks, a trainer is only known by its process id, once it has written that.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TRIES, PAUSE = 100, 0.01
"""Retries and seconds between them: `is_held` takes a shared lock for a moment."""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append to, locked, for a process to inherit. Raises `BlockingIOError` if it is locked."""
    with path.open("ab") as file:  # closed, not unlocked: child processes keep the lock
        for left in reversed(range(TRIES)):
            try:
                lock(file.fileno(), exclusive=True)
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(PAUSE)
        yield file


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock on a file."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would block
    except OSError:
        return False
    try:
        lock(number, exclusive=False)
    except BlockingIOError:
        return True
    finally:
        os.close(number)
    return False


def lock(number: int, exclusive: bool) -> None:
    """Lock a file descriptor or raise `BlockingIOError`; do nothing on a file system without locks."""
    if fcntl is not None:
        try:
            fcntl.flock(number, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
