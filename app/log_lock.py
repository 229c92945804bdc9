"""Detect running trainers by a lock on the log file that a trainer writes to.

The launcher and the trainer inherit the open file and its lock. So the lock remains if the application exits, and is
released when both processes have exited. On a system without such locks, a trainer is only detected by its process id,
after the trainer has written the id to the run's folder.
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

TRIES, PAUSE = 1000, 0.01
"""Number of attempts to lock a file, and seconds between attempts. An attempt can fail because `is_held` takes a shared
lock for a moment, which is long if its process is suspended."""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for appending and lock it, so that a child process can inherit the file and its lock.

    Raises `BlockingIOError` if another process holds the lock.
    """
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
    """Return whether any process holds the exclusive lock on a file."""
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
    """Lock the file descriptor `number`; do nothing on a file system without locks.

    Raises `BlockingIOError` if another process holds the lock."""
    if fcntl is not None:
        try:
            fcntl.flock(number, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
