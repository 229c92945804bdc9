"""Turns at a resource that one thread at a time can use.

Gradio's queue gives turns to complete events (`concurrency_limit=1`): an image of half a second behind a request for
eight images took 5.5 s.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator


class Turns:
    """A fair lock in order of arrival: a request for eight images lets other requests run in between."""

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
