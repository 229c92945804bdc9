"""Turns at what only one can have at a time.

Gradio's queue gives them to whole events (`concurrency_limit=1`): an image of half a second that was asked for behind
eight took 5.5 s there.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator


class Turns:
    """One at a time, in the order of asking: who asks for eight images lets others have theirs in between."""

    def __init__(self) -> None:
        self.waiting: deque[object] = deque()
        self.moved = threading.Condition()

    @contextlib.contextmanager
    def turn(self, check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Waits for its turn and holds it; `check` is called meanwhile, and may raise to give up."""
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
