"""The errors of event handlers as sentences, and the paths of uploaded files."""

import contextlib
import errno
import functools
import html
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
from gradio.exceptions import InvalidPathError
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from reslora.options.prompts import clean

from .runs import RunError

NO_PROGRESS = {"show_progress": "hidden", "show_progress_on": []}
"""Event options that disable the progress display. Without the empty list, Gradio's page would update each output at
the start and end of every event, which took half of the page's loading time."""
QUIET = {"api_visibility": "private", **NO_PROGRESS}
"""Options of an event that only the page triggers, not API clients."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Error numbers (`errno`) of a disk that is full, read-only or over quota."""


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Convert any exception to a Gradio error of one sentence; unexpected exceptions are printed to the terminal.

    The sentence is escaped, because the page shows the message of a Gradio error as HTML."""
    try:
        yield
    except Exception as error:
        told = translated(error)
        told.message = html.escape(told.message, quote=False)
        raise told from None


def server_function(handler: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """Wrap a handler that JavaScript calls directly, so that it returns an error as a sentence under the key `error`.

    The wrapped handler is a function, because Gradio sets an attribute on it, which methods do not allow.
    """

    @functools.wraps(handler)
    def wrapped(edit: dict) -> dict:
        """Call the handler; an error becomes a message in the result."""
        try:
            return handler(edit)
        except Exception as error:
            return {"error": str(translated(error).message)}

    return wrapped


def translated(error: Exception) -> gr.Error:
    """Convert an exception to the Gradio error that the page shows; print an unexpected exception to stderr."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, RunError):
        return gr.Error(clean(str(error)), print_exception=False)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        own = str(error.filename or "").startswith(tempfile.gettempdir())
        room = ": make room on the disk that has the system's temporary folder" if own else ""
        return gr.Error(f"A file cannot be written ({error.strerror}){room}.", print_exception=False)
    traceback.print_exception(error, file=sys.stderr)
    return gr.Error("An unexpected error occurred; see the terminal for details.", print_exception=False)


def path_of(payload) -> Path | None:
    """Return the path of an uploaded file from the payload of an event with `preprocess=False`; None without a file.

    Gradio's preprocessing would reject an API client's wrong value before the handler can explain the error.
    """
    return Path(payload["path"]) if payload else None


class Blocks(gr.Blocks):
    """Gradio's `Blocks`, whose errors are sentences, and whose pages can stay open without using more memory."""

    async def preprocess_data(self, *args, **kwargs) -> list:
        """Return the inputs of an event. A wrong one, such as a file that was not uploaded, becomes one sentence."""
        with translating():
            try:
                return await super().preprocess_data(*args, **kwargs)
            except InvalidPathError:
                raise RunError("A file was not uploaded on this page; upload it.") from None
            except (gr.Error, ValueError, TypeError, LookupError, AttributeError) as error:
                raise RunError(f"An input is invalid ({type(error).__name__}); reload the page.") from None

    async def call_function(self, *args, **kwargs) -> dict:
        """Call a handler."""
        with translating():
            return await super().call_function(*args, **kwargs)

    async def postprocess_data(self, block_fn, predictions, state) -> list:
        """Return the outputs of an event, without one more copy of each component that the event reads and updates.

        Gradio gives the copy another id, so that the next event adds one: 100 MiB an hour for each open page.
        """
        output = await super().postprocess_data(block_fn, predictions, state)
        for block in block_fn.outputs if state else ():
            if not block.stateful and block._id in state:
                state[block._id]._id = block._id
        return output


async def cannot_store(request: Request, error: OSError) -> PlainTextResponse:
    """Respond to an upload with status 507 and a message for the page, if the disk is full or read-only.

    Other errors are raised again.
    """
    if error.errno not in UNWRITABLE:
        raise error
    advice = "make room on the disk that has the system's temporary folder"
    return PlainTextResponse(f"The files cannot be stored ({error.strerror}): {advice}.", status_code=507)
