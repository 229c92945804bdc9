"""Adapt Gradio's sessions (open pages): memory, lifetime, and whether the client still reads.

Gradio closes a handler when its response stream breaks, but does not notice a stream that was never opened. Without
`hears` such a client's images are generated to the end while other users wait.
"""

import gradio as gr
from fastapi import Request
from fastapi.responses import PlainTextResponse
from gradio.blocks import BlocksConfig

from .handlers import UNWRITABLE


async def cannot_store(request: Request, error: OSError) -> PlainTextResponse:
    """Answer an upload with status 507 if the disk is full or read-only; the page shows the message.

    Raises any other error again.
    """
    if error.errno not in UNWRITABLE:
        raise error
    advice = "make room on the disk that has the system's temporary folder"
    return PlainTextResponse(f"The files cannot be stored ({error.strerror}): {advice}.", status_code=507)


LAUNCH = {
    "max_threads": 64,
    "state_session_capacity": 100,
    "app_kwargs": {"exception_handlers": {OSError: cannot_store}},
}
"""Arguments of `launch`. Threads: an event that waits for its turn holds one, and as many remain for other events.
Sessions: a page that returns after a hundred others starts anew."""
TURNS = {"concurrency_id": "turns", "concurrency_limit": 32}
"""Options of events that take turns on the device, one image at a time. An event beyond the limit waits for a complete
event (eight images or a grid) to end; the limit allows for thirty users."""


def hears(asked: gr.Request) -> bool:
    """Return whether the client reads its messages; those of a client that left are not fetched.

    A client that keeps its stream open without reading counts as reading until the connection's buffers are full.
    """
    messages = asked.request.app.get_blocks()._queue.pending_messages_per_session.get(asked.session_hash)
    return messages is not None and messages.empty()


class Contents(BlocksConfig):
    """The components and events of a page."""

    def __copy__(self) -> BlocksConfig:
        """Return a session's copy, which does not describe its components.

        Gradio describes all components again with each update, for links to the current state of the page. The page has
        no such links, and describing takes 0.03 s, for which all users wait, and 0.8 MiB.
        """
        contents = super().__copy__()
        contents.config_for_block = lambda *_: {}
        return contents


class Blocks(gr.Blocks):
    """Gradio's blocks for pages that stay open for a long time."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.default_config = Contents(self)

    async def postprocess_data(self, block_fn, predictions, state) -> list:
        """Return the outputs of an event without copying unchanged ones and without accumulating copies.

        Gradio stores an updated component as a copy with a new id, and the session gets another copy with each event
        that reads it: five per poll of a page, 30 MiB per minute with thirty users.
        """
        if isinstance(predictions, dict) and predictions == gr.skip():
            return [None if block.stateful else gr.skip() for block in block_fn.outputs]
        output = await super().postprocess_data(block_fn, predictions, state)
        for block in block_fn.outputs if state else ():
            if not block.stateful and block._id in state:
                state[block._id]._id = block._id
        return output
