"""Adapt Gradio's sessions (one for each open page): limit their memory, and detect clients that do not read messages.

Gradio stops an event handler when the client's message stream breaks, but not if the client never opens the stream.
Without `hears`, all images for such a client would be generated while other users wait.
"""

import gradio as gr
from fastapi import Request
from fastapi.responses import PlainTextResponse
from gradio.blocks import BlocksConfig

from .handlers import UNWRITABLE, named_inputs, translating


async def cannot_store(request: Request, error: OSError) -> PlainTextResponse:
    """Respond to an upload with status 507 and a message for the page, if the disk is full or read-only.

    Other errors are raised again.
    """
    if error.errno not in UNWRITABLE:
        raise error
    advice = "make room on the disk that has the system's temporary folder"
    return PlainTextResponse(f"The files cannot be stored ({error.strerror}): {advice}.", status_code=507)


LAUNCH = {
    "max_threads": 64,
    "state_session_capacity": 100,
}
"""Arguments of `launch`.

`max_threads`: each of the 32 events with the options `TURNS` occupies a thread, even while it waits; 32 threads remain
for other events. `state_session_capacity`: a page that reconnects after 100 newer sessions starts with a new state.
"""
TURNS = {"concurrency_id": "turns", "concurrency_limit": 32}
"""Options of events that take turns on the device after each image. At most 32 such events run at the same time, enough
for thirty users: a 33rd event waits until all images or the grid of another event are finished."""


def hears(asked: gr.Request) -> bool:
    """Return whether the client reads its messages: whether its stream is open and no message is waiting in it.

    A client that keeps its stream open without reading is only detected when the connection's buffers are full.
    """
    queue = asked.request.app.get_blocks()._queue
    # Depending on which of its tasks notices a closed stream, Gradio removes the messages or marks the events.
    events = [each for worker in queue.active_jobs for each in worker or () if each.session_hash == asked.session_hash]
    messages = queue.pending_messages_per_session.get(asked.session_hash)
    return messages is not None and messages.empty() and all(event.alive for event in events)


class Contents(BlocksConfig):
    """Gradio's configuration of a page, its components and events, whose copies take less time and memory."""

    def __copy__(self) -> BlocksConfig:
        """Return a copy for a session, without the configuration of the components.

        Gradio would build the configuration of all components after each update, for links to the current state of the
        page. This page has no such links, and each build takes 0.8 MiB and 0.03 s, during which all users wait.
        """
        contents = super().__copy__()
        contents.config_for_block = lambda *_: {}
        return contents


class Blocks(gr.Blocks):
    """Gradio's `Blocks`, changed so that pages can stay open for a long time without accumulating memory."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.default_config = Contents(self)

    async def preprocess_data(self, *args, **kwargs) -> list:
        """Return the inputs of an event. A wrong one, such as a file that was not uploaded, becomes one sentence."""
        with translating(), named_inputs():
            return await super().preprocess_data(*args, **kwargs)

    async def call_function(self, *args, **kwargs) -> dict:
        """Call a handler. Its errors become one sentence without paths or traceback."""
        with translating():
            return await super().call_function(*args, **kwargs)

    async def postprocess_data(self, block_fn, predictions, state) -> list:
        """Return the outputs of an event, without accumulating copies of components in the session.

        Gradio stores an updated component as a copy with a new id. Each later event that reads the component would add
        another copy to the session: five copies per poll of a page, 30 MiB per minute with thirty users.
        """
        if isinstance(predictions, dict) and predictions == gr.skip():
            return [None if block.stateful else gr.skip() for block in block_fn.outputs]
        output = await super().postprocess_data(block_fn, predictions, state)
        for block in block_fn.outputs if state else ():
            if not block.stateful and block._id in state:
                state[block._id]._id = block._id
        return output
