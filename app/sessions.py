"""What Gradio keeps for a session, a page that is open: what, for how long, and whether anybody reads it.

Gradio closes a handler whose stream of answers breaks. A stream that was never opened it does not notice: where two
images were asked for and nobody came for them, it drew both to their last step while the next visitor waited.
"""

from __future__ import annotations

import gradio as gr
from fastapi import Request
from fastapi.responses import PlainTextResponse
from gradio.blocks import BlocksConfig

from .handlers import UNWRITABLE


async def cannot_store(request: Request, error: OSError) -> PlainTextResponse:
    """What an upload is answered that the disk has no room for; the page shows it."""
    if error.errno not in UNWRITABLE:
        raise error
    advice = "make room on the disk that has the system's temporary folder"
    return PlainTextResponse(f"The files cannot be stored ({error.strerror}): {advice}.", status_code=507)


LAUNCH = {
    "max_threads": 64,
    "state_session_capacity": 100,
    "app_kwargs": {"exception_handlers": {OSError: cannot_store}},
}
"""Threads: each event that waits for its turn holds one; there are as many for all else. Sessions: a page is shown
everything anew that comes back after a hundred others."""
TURNS = {"concurrency_id": "turns", "concurrency_limit": 32}
"""Of events that take turns at the device, an image at a time. Whoever has no place among them waits for a whole event,
of eight images or of a grid; so there is one for each of thirty visitors."""


def hears(asked: gr.Request) -> bool:
    """Whether a session reads what it is told: who has gone, or never came, leaves messages lying.

    A client that holds its stream open and never reads is not told from one that reads before the connection's buffers
    are full.
    """
    messages = asked.request.app.get_blocks()._queue.pending_messages_per_session.get(asked.session_hash)
    return messages is not None and messages.empty()


class Contents(BlocksConfig):
    """The components and events of a page."""

    def __copy__(self) -> BlocksConfig:
        """A session's, which does not describe its components.

        Gradio describes them all, and anew with each update, for links that lead to a page as it is now. There are none
        here, and whoever comes would keep all others waiting for it: 0.03 s, and 0.8 MiB.
        """
        contents = super().__copy__()
        contents.config_for_block = lambda *_: {}
        return contents


class Blocks(gr.Blocks):
    """Gradio's blocks, for pages that stay open."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.default_config = Contents(self)

    async def postprocess_data(self, block_fn, predictions, state) -> list:
        """As Gradio does, but nothing is copied for a look that finds nothing new, and copies do not pile up.

        Gradio keeps an updated component as a copy with an id of its own; the session then gets one more with every
        event that reads it: five with each look of a page, 30 MiB a minute with thirty visitors.
        """
        if isinstance(predictions, dict) and predictions == gr.skip():
            return [None if block.stateful else gr.skip() for block in block_fn.outputs]
        output = await super().postprocess_data(block_fn, predictions, state)
        for block in block_fn.outputs if state else ():
            if not block.stateful and block._id in state:
                state[block._id]._id = block._id
        return output
