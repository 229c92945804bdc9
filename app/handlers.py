"""What handlers of the page's events share: errors as sentences for people, and where uploaded files are."""

from __future__ import annotations

import errno
import functools
import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

import gradio as gr

from reslora.options.prompts import clean

from .runs import RunError

NO_PROGRESS = {"show_progress": "hidden", "show_progress_on": []}
"""Of an event. Hidden alone is not enough: whenever any event begins or ends, Gradio's page would still tell each of
its outputs, and look that up among all parts of the page. It took half of the time until the page was there."""
QUIET = {"api_visibility": "private", **NO_PROGRESS}
"""Of an event that only the page itself causes."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Why a disk takes no file."""


def readable_errors(handler: Callable) -> Callable:
    """The handler, function or generator, with errors of one sentence: no path, no traceback.

    Whatever is unexpected goes to the terminal.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*args, **kwargs):
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise translated(error) from None
    else:

        @functools.wraps(handler)
        def wrapped(*args, **kwargs):
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                raise translated(error) from None

    return wrapped


def named(handler: Callable, parameters: Sequence[str]) -> Callable:
    """The handler with names for the values it takes, for programs that call it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    handler.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in parameters])
    return handler


def translated(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, RunError):
        return gr.Error(clean(str(error)), print_exception=False)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        own = str(error.filename or "").startswith(tempfile.gettempdir())
        room = ": make room on the disk that has the system's temporary folder" if own else ""
        return gr.Error(f"A file cannot be written ({error.strerror}){room}.", print_exception=False)
    traceback.print_exception(error, file=sys.stderr)
    return gr.Error("Something went wrong; the terminal says more.", print_exception=False)


def paths_of(payload) -> list[str]:
    """Where uploaded files are, of what Gradio hands on for a file component whose event does not preprocess.

    Preprocessing would refuse a program's wrong value before the handler could say in words what is wrong with it.
    """
    files = payload if isinstance(payload, list) else [payload] if payload else []
    return [file["path"] for file in files]
