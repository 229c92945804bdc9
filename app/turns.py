"""Let threads take turns at a resource that only one of them can use at a time.

Gradio's queue (`concurrency_limit=1`) would complete a request for eight images before starting the next request: an
image that takes half a second then arrived after 5.5 s.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator


class Turns:
    """A lock that threads acquire in the order in which they ask for it.

    A request for eight images acquires the lock again for each image, so that other requests run in between.
    """

    def __init__(self) -> None:
        self.waiting: deque[object] = deque()
        self.moved = threading.Condition()

    @contextlib.contextmanager
    def turn(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for a turn, and hold it during the `with` block.

        `check`: called while waiting; an exception that it raises ends the wait."""
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
