"""Ctrl-C, SIGTERM, a terminal that closes and the death of the launcher ask a script to save and leave.

    with StopRequest() as stop:
        for batch in batches:
            step(batch)
            if stop.signal is not None:     # with several processes: share it first, all must leave after the same step
                save()
                raise Stopped("stopped after step 7; go on with --resume_from_checkpoint latest")

The exit status of a stopped script is `128 + stop.signal`. `accelerate launch` does not pass SIGTERM on to the one
process that it starts, and nobody passes on SIGKILL: without `StopRequest` that process would train on, alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import Stopped, speaks

# Programs that start training processes and wait for them, by the name of their file or module.
_LAUNCHERS = {
    "accelerate", "accelerate.commands.accelerate_cli", "accelerate.commands.launch", "torchrun",
    "torch.distributed.run", "torch.distributed.launch", "deepspeed",
}  # fmt: skip
_TOLD: Any = getattr(signal, "SIGUSR1", None)  # from the kernel when the launcher dies, and from the application
_HUNG_UP: Any = getattr(signal, "SIGHUP", None)  # what a terminal sends that closes, or whose connection is lost
_PR_SET_PDEATHSIG = 1
SIGNALS = {number for number in (signal.SIGINT, signal.SIGTERM, _HUNG_UP, _TOLD) if number is not None}
"""What a script answers by a request to stop."""
NOT_BEGUN = "stopped before training began"
"""What `StopRequest.check` says where there is nothing to save yet."""


class StopRequest:
    """While it is open, the first SIGINT or SIGTERM is noted in `signal`, and the next one ends the process at once.

    Handlers are installed whatever the process inherits (`nohup` and background shells leave SIGINT ignored), and the
    earlier ones come back at the end. `signal` is also SIGTERM once the launcher is gone, after SIGHUP, which `nohup`
    has ignored, or after SIGUSR1, by which batch systems announce the end and the application asks. However often
    these come, they never end the process at once, except within `at_once`; a SIGINT or SIGTERM after them counts as
    the first. torch's launcher repeats what the terminal has sent already, so below it the third one ends the process.
    Only for the main thread.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before_leaving = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
        self._heard = 0  # SIGINT and SIGTERM alone
        self._launcher: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """The number of the signal that asks to stop, or None; may be set, to share what another process was asked."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._launcher:
            self._signal = signal.SIGTERM
        return self._signal

    @signal.setter
    def signal(self, number: int | None) -> None:
        self._signal = number

    def shared(self, asked: bool) -> bool:
        """Return whether any process was `asked`, which this one notes as its own SIGTERM if it was not: all end alike."""
        if asked and self.signal is None:
            self.signal = signal.SIGTERM
        return asked

    def check(self, message: str) -> None:
        """Raise `Stopped` with the message if a stop was asked for: for long work that has nothing to save."""
        if self.signal is not None:
            raise Stopped(message)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal or the launcher's death ends one of several processes at once; raises `Stopped` before that.

        For where processes meet first: they wait for the launcher inside a library, deaf to Python's handlers.
        """
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        handlers = {number: signal.signal(number, signal.SIG_DFL) for number in self._previous if several}
        try:
            self.check(NOT_BEGUN)
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def __enter__(self) -> StopRequest:
        numbers = {signal.SIGINT: self._asked, signal.SIGTERM: self._asked}
        if _TOLD is not None:
            numbers[_TOLD] = self._told
        if _HUNG_UP is not None and signal.getsignal(_HUNG_UP) != signal.SIG_IGN:
            numbers[_HUNG_UP] = self._told
        self._previous = {number: signal.signal(number, handler) for number, handler in numbers.items()}
        self._launcher = _launcher()
        if self._launcher is not None:
            _signal_on_death_of_parent()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous, self._launcher = {}, None

    def _asked(self, number: int, frame: object) -> None:
        if self._heard == 0:
            self._signal = self._signal or number
            _tell("stopping after this step; once more to stop at once")
        elif self._heard == self._before_leaving:
            os._exit(128 + number)
        self._heard += 1

    def _told(self, number: int, frame: object) -> None:
        if self._signal is None:
            self._signal = signal.SIGTERM
            _tell("stopping after this step: it was asked to stop, or its terminal or launcher is gone")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Inside, `SIGNALS` wait: a process that is started there gets none before it can answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if os.name == "posix" else set()
    try:
        yield
    finally:
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tell(text: str) -> None:
    """A line on stderr; not by `print`, which a signal may have interrupted."""
    if speaks():
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


def _launcher() -> int | None:
    """Return the process id of the parent if that is a launcher; None for a shell, an application or a test."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # not Linux: accelerate and torch tell their children in the environment
        told = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        return parent if told and parent != 1 else None
    return parent if is_launcher(words) else None


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line, as words, is one of accelerate's, torch's or DeepSpeed's launchers."""
    # The interpreter with its options and `-m` may come first; what follows further behind are the script's own words.
    return any(word in _LAUNCHERS or Path(word).name in _LAUNCHERS for word in command[:4])


def _signal_on_death_of_parent() -> None:
    """Linux: the kernel sends SIGUSR1 when the parent dies. Elsewhere `StopRequest.signal` looks for itself."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(_TOLD), 0, 0, 0)
