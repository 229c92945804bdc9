"""Which trainers are at work, from their first moment: who prints into a run's log holds a lock on it until it is gone.

Launcher and trainer inherit the lock with the file that they print into, so that it outlives the application, and ends
with the last of them, however that ends. Where a system has no such locks, a trainer is known by its process id alone,
once it has written that.
"""

from __future__ import annotations

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
"""Whoever looks whether a lock is held, shares it for a moment."""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[BinaryIO]:
    """A file to append to, with the lock on it, for a process to inherit; `BlockingIOError` if another one has it."""
    with path.open("ab") as file:  # closed and not unlocked: the lock stays with who has inherited it
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
    """Whether a process holds the lock on a file."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe in its place would be waited for
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
    """Takes the lock, or raises `BlockingIOError`; does nothing on a file system that has none."""
    if fcntl is not None:
        try:
            fcntl.flock(number, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
