"""Write a run's current phase to `.status.json` in its directory, for the application.

The file is removed when the directory is unlocked.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import RunFailed
from ..io import write_json
from .peak_memory import peak_memory
from .processes import is_main

FILE = ".status.json"
EVERY = 1.0  # seconds between two writes of a phase's progress


@dataclass
class Status:
    """Current phase and progress of a run, written by the main process; without a directory nothing is written.

    The file contains `process` (id), `phase`, `name` (the method or run of an experiment that is trained; may be empty)
    and `memory_bytes` (peak; null if unknown). A phase that counts items also has `done`, `total` and `per_second`
    (items per second; null until two items are done).
    """

    folder: Path | None = None
    device: torch.device | None = None
    phase: tuple[str, str] = ("", "")
    told: float = 0.0
    first: tuple[float, int] = (0.0, 0)
    """Time and `done` of the phase's first report: the items until then may be slow and do not count in the rate."""

    def say(self, phase: str, name: str = "") -> None:
        """Begin a phase and write it immediately, because the next update may come only after minutes."""
        self.phase = (phase, name)
        self._write()

    def count(self, phase: str, done: int, total: int, name: str = "") -> None:
        """Report that `done` of `total` items are done; `phase` ends with the kind of item, as in `encoding image`."""
        now = time.monotonic()
        if self.phase != (phase, name):
            self.phase, self.first = (phase, name), (now, done)
        if now - self.told >= EVERY:
            began, before = self.first
            rate = (done - before) / (now - began) if done > before else None
            self._write(done=done, total=total, per_second=rate)

    def _write(self, **counted: float | None) -> None:
        if self.folder is None or not is_main():
            return
        self.told, (phase, name) = time.monotonic(), self.phase
        memory = peak_memory(self.device) if self.device else None
        content = {"process": os.getpid(), "phase": phase, "name": name, "memory_bytes": memory, **counted}
        with contextlib.suppress(OSError, RunFailed):  # an unwritten status does not end a run
            if self.folder.is_dir():  # do not create a directory again that was moved
                write_json(self.folder / FILE, content)
