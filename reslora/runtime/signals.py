"""Handle Ctrl-C, SIGTERM, a closed terminal and the death of the launcher as requests to save and exit.

    with StopRequest() as stop:
        for batch in batches:
            step(batch)
            if stop.signal is not None:     # with several processes: `if processes.stop_requested(stop):`
                save()
                raise Stopped("stopped after step 7; resume with --resume_from_checkpoint latest")

The exit status of a stopped script is `128 + stop.signal`. `accelerate launch` does not forward SIGTERM to a
single process, and SIGKILL cannot be forwarded: without `StopRequest` that process would continue to train.
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

import psutil

from ..errors import Stopped, speaks

# Programs that start training processes and wait for them, by the name of their file or module.
_LAUNCHERS = {
    "accelerate", "accelerate.commands.accelerate_cli", "accelerate.commands.launch", "torchrun",
    "torch.distributed.run", "torch.distributed.launch", "deepspeed",
}  # fmt: skip
_TOLD: Any = getattr(signal, "SIGUSR1", None)  # sent by the kernel when the launcher dies, and by the application
_HUNG_UP: Any = getattr(signal, "SIGHUP", None)  # sent by a terminal that closes or loses its connection
_PR_SET_PDEATHSIG = 1
SIGNALS = {number for number in (signal.SIGINT, signal.SIGTERM, _HUNG_UP, _TOLD) if number is not None}
"""Signals that a script handles as a request to stop."""
NOT_BEGUN = "stopped before training began"
"""Message for `StopRequest.check` before training begins."""


class StopRequest:
    """Inside this context, store the first SIGINT or SIGTERM in `signal`; the second ends the process immediately.

    In a process started by torch's launcher, only the third signal ends the process, because this launcher repeats
    signals that the terminal has already sent.

    `signal` also becomes SIGTERM in three other cases:

    - the launcher has ended;
    - SIGHUP arrived, and `nohup` does not ignore it;
    - SIGUSR1 arrived, which batch systems and the application send.

    With `flag`, it also becomes SIGTERM once this file exists: by it, a process stops others, also on other machines.

    These cases never end the process immediately, except inside `at_once`, and do not count as the first SIGINT or
    SIGTERM.

    Handlers are installed even if signals are ignored on entry (`nohup` and background shells ignore SIGINT). The
    earlier handlers are restored at the end. Use this class only in the main thread.
    """

    def __init__(self, flag: Path | None = None) -> None:
        self._flag = flag
        self._signal: int | None = None
        self._before_leaving = 2 if "TORCHELASTIC_RUN_ID" in os.environ else 1
        self._heard = 0  # count of SIGINT and SIGTERM only
        self._launcher: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """Number of the signal that requests a stop, or None; can be set if another process received it."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        if self._signal is None and (orphaned or (self._flag is not None and self._flag.exists())):
            self._signal = signal.SIGTERM
        return self._signal

    @signal.setter
    def signal(self, number: int | None) -> None:
        """Set the signal."""
        self._signal = number

    def shared(self, asked: bool) -> bool:
        """Store whether any process was asked to stop (`asked`), and return `asked`.

        If the shared flag is true, `signal` becomes SIGTERM in this process too, so that all processes exit with the
        status of a stopped run.
        """
        if asked and self.signal is None:
            self.signal = signal.SIGTERM
        return asked

    def check(self, message: str) -> None:
        """Raise `Stopped` with the message if a stop was requested; call this during long work with nothing to save."""
        if self.signal is not None:
            raise Stopped(message)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal or the launcher's death end this process immediately, unless it is the only process of the run.

        Raises `Stopped` if a stop was requested before. Use this at the start of a distributed run: processes wait for
        the launcher inside a library, which blocks Python's signal handlers.
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
            numbers[_TOLD] = self._handle
        if _HUNG_UP is not None and signal.getsignal(_HUNG_UP) != signal.SIG_IGN:
            numbers[_HUNG_UP] = self._handle
        self._previous = {number: signal.signal(number, handler) for number, handler in numbers.items()}
        self._launcher = _launcher()
        if self._launcher is not None:
            # The kernel sends SIGUSR1 when the parent dies (Linux only). Elsewhere `signal` polls the parent.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(_TOLD), 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous, self._launcher = {}, None

    def _asked(self, number: int, frame: object) -> None:
        if self._heard == 0:
            self._signal = self._signal or number
            _write_line("stopping after this step; send the signal again to stop immediately")
        elif self._heard == self._before_leaving:
            os._exit(128 + number)
        self._heard += 1

    def _handle(self, number: int, frame: object) -> None:
        if self._signal is None:
            self._signal = signal.SIGTERM
            _write_line("stopping after this step: a stop was requested, or the terminal or launcher has ended")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block `SIGNALS` inside this context, so that a process started in it receives none before it has handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if os.name == "posix" else set()
    try:
        yield
    finally:
        if os.name == "posix":
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_line(text: str) -> None:
    """Print a line on stderr without `print`, because the signal may have interrupted a `print`."""
    if speaks():
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


def _launcher() -> int | None:
    """Return the process id of the parent if the parent is a launcher; None if the parent is a shell, the application
    or a test.
    """
    parent = os.getppid()
    with contextlib.suppress(psutil.Error):  # it has ended
        return parent if is_launcher(psutil.Process(parent).cmdline()) else None
    return None


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line starts a launcher of accelerate, torch or DeepSpeed."""
    # The interpreter, its options and `-m` may come first; later arguments belong to the script.
    return any(word in _LAUNCHERS or Path(word).name in _LAUNCHERS for word in command[:4])
