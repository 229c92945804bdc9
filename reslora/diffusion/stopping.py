"""Stopping with several processes: all of them must leave after the same step."""

from __future__ import annotations

import signal

import torch
from accelerate import Accelerator

from ..signals import StopRequest


def leave_if_asked(stop: StopRequest, accelerator: Accelerator, message: str) -> None:
    """Ends long work that has nothing to save; with several processes only the training loop ends them together."""
    if accelerator.num_processes == 1:
        stop.check(message)


def stop_requested(stop: StopRequest, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop; all processes must call it together."""
    asked = stop.signal is not None
    if accelerator.num_processes > 1:
        asked = bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)) > 0)
        if asked and stop.signal is None:
            stop.signal = signal.SIGTERM
    return asked
