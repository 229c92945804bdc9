"""Ignore EPIPE and EIO on stdout and stderr, so that a closed terminal or pipe does not end training.

Also print file names that cannot be encoded, so that they do not end it either.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

_GONE = (errno.EIO, errno.EPIPE)  # errors when writing to a closed terminal (EIO) or pipe (EPIPE)


@contextlib.contextmanager
def ignore_broken_pipes() -> Iterator[None]:
    """Discard output inside this context once its terminal or pipe is closed.

    Otherwise an error would end training before it has saved.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        for name in ("write", "flush"):
            setattr(stream, name, _outliving(stream, getattr(stream, name)))
    try:
        yield
    finally:
        for stream in streams:
            for name in ("write", "flush"):
                vars(stream).pop(name, None)


def take_any_file_name() -> None:
    """Print file names with backslash escapes if they are not valid text."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _outliving(stream: TextIO, do: Callable) -> Callable:
    def done(*what: Any) -> Any:
        try:
            return do(*what)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())  # also discards the rest of the buffer when Python exits
            return do(*what)

    return done
