"""Who reads what a script prints may go: a terminal that closes, `tee` that ends. The script goes on.

Nor does it end at a name that is no text.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

_GONE = (errno.EIO, errno.EPIPE)  # what a write to a terminal says, and to a pipe


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """Inside, what nobody can read any more is dropped; to print it would end the script, its last steps unsaved."""
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
    """File names need not be text: what cannot be printed is escaped."""
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
                os.dup2(nowhere.fileno(), stream.fileno())  # also for what is in its buffer when Python ends
            return do(*what)

    return done
