"""Ignore EPIPE and EIO on stdout and stderr, so that a closed terminal or pipe does not end training.

Also escape characters of file names that these streams cannot encode, so that printing them does not end training.
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

    Otherwise writing would raise an error, which would end training without saving.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    for stream in streams:
        for name in ("write", "flush"):
            setattr(stream, name, _ignoring_broken_pipe(stream, getattr(stream, name)))
    try:
        yield
    finally:
        for stream in streams:
            for name in ("write", "flush"):
                vars(stream).pop(name, None)


def take_any_file_name() -> None:
    """Let stdout and stderr escape characters that they cannot encode, so that any file name can be printed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _ignoring_broken_pipe(stream: TextIO, do: Callable) -> Callable:
    def write_or_discard(*what: Any) -> Any:
        """Call `do`; if the reader has gone, redirect the stream to `os.devnull` first."""
        try:
            return do(*what)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())  # also discards the rest of the buffer when Python exits
            return do(*what)

    return write_or_discard
