"""Who is listening: the streams by which the server tells a session what has come of what it asked.

Gradio notices a stream that breaks, but not one that was never opened: a request that nobody listens to would be worked
on to its end. This layer of the server (ASGI) keeps the streams that are open.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from urllib.parse import parse_qs

STREAM = re.compile(r"/gradio_api/(?:queue/data|call/(?:v2/)?[^/]+/(?P<event>\w+))$")


class Listeners:
    """Sessions with an open stream."""

    def __init__(self) -> None:
        self.open: Counter[str] = Counter()
        self.lock = threading.Lock()

    def is_listening(self, session: str) -> bool:
        return self.open[session] > 0

    def count(self, session: str, change: int) -> None:
        with self.lock:
            self.open[session] += change
            if not self.open[session]:
                del self.open[session]


class ListenersMiddleware:
    """Counts a request for a stream from its beginning to its end, however it ends."""

    def __init__(self, app, listeners: Listeners) -> None:
        self.app, self.listeners = app, listeners

    async def __call__(self, scope, receive, send) -> None:
        session = session_of(scope)
        if session is None:
            return await self.app(scope, receive, send)
        self.listeners.count(session, 1)
        try:
            await self.app(scope, receive, send)
        finally:
            self.listeners.count(session, -1)


def session_of(scope) -> str | None:
    """The session that a request opens a stream for; None if it opens none."""
    found = STREAM.search(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
    if found is None:
        return None
    if found["event"] is None:
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])), None)
    # `call/<name>/<event>` is for the session that its POST named, or for one of the event's own name.
    queue = scope["app"].get_blocks()._queue
    event = getattr(queue, "event_ids_to_events", {}).get(found["event"])
    return event.session_hash if event is not None else found["event"]
