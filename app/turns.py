"""Let threads take turns at a resource that only one of them can use at a time.

Gradio's queue (`concurrency_limit=1`) completes an event before it starts the next one: an image that takes half a
second came after 5.5 s if it waited for a request for eight images.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator


class Turns:
    """A lock that threads get in the order in which they ask for it.

    A request for eight images asks again for each image, so other requests run in between.
    """

    def __init__(self) -> None:
        self.waiting: deque[object] = deque()
        self.moved = threading.Condition()

    @contextlib.contextmanager
    def turn(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for a turn and hold it; `check` is called while waiting, and may raise to give up."""
        ticket = object()
        with self.moved:
            self.waiting.append(ticket)
        try:
            with self.moved:
                while self.waiting[0] is not ticket:
                    check()
                    self.moved.wait(0.2)
            yield
        finally:
            with self.moved:
                self.waiting.remove(ticket)
                self.moved.notify_all()
