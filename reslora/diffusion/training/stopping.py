"""Stopping with several processes: all of them must leave after the same step."""

from __future__ import annotations

import signal

from ...common.signals import StopRequest
from ...common.together import any_of


def stop_requested(stop: StopRequest) -> bool:
    """Whether any process was asked to stop; all processes must call it together, and go by the answer alone."""
    asked = any_of(stop.signal is not None)
    if asked and stop.signal is None:
        stop.signal = signal.SIGTERM
    return asked
