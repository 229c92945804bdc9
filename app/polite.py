"""Errors for people: one sentence, no path and no traceback; whatever is unexpected goes to the terminal."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
from collections.abc import Callable

import gradio as gr

from .runs import RunError


def polite(handler: Callable) -> Callable:
    """The handler of an event, function or generator, whose errors are sentences."""
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


def translated(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, RunError):
        return gr.Error(str(error), print_exception=False)
    traceback.print_exception(error, file=sys.stderr)
    return gr.Error("Something went wrong; the terminal says more.", print_exception=False)


def paths_of(payload) -> list[str]:
    """Where uploaded files are, of what Gradio hands on for a file component whose event does not preprocess.

    Preprocessing would refuse a program's wrong value before the handler could say in words what is wrong with it.
    """
    files = payload if isinstance(payload, list) else [payload] if payload else []
    return [file["path"] for file in files]
