"""Train several arms in parallel, each in a worker process.

The main process trains no arm: it locks the directory, encodes the data, assigns arms to workers and waits for them. A
worker repeats this preparation without output, using the cached encodings, and then trains the arms assigned to it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import patch_environment

from ..errors import EndedElsewhere, RunFailed, Stopped
from ..options.shared import SharedExperimentOptions
from ..runtime.script import run_script
from ..runtime.signals import SIGNALS, StopRequest, signals_blocked
from .arms import Arm, Grids

if TYPE_CHECKING:
    from .schedule import ArmSchedule

PATIENCE = 0.2  # seconds between two polls for a request to stop
STOP = "stop"
POSIX = os.name == "posix"


class Orders:
    """A worker's connection to the main process, which assigns arms to the worker.

    The worker exits if the main process ends: the directory is then no longer locked, and must not be written to.
    """

    def __init__(self, number: int, connection: Connection, stop: StopRequest) -> None:
        self.number = number
        self._connection, self._stop = connection, stop
        self._arms: queue.SimpleQueue[tuple[Arm, dict[str, list[float]]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                told = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            if told == STOP:
                self._stop.signal, told = signal.SIGTERM, None
            self._arms.put(told)

    def arms(self, schedule: ArmSchedule) -> Iterator[Arm]:
        """Yield the arms to train as they arrive, until a stop.

        Requesting the next arm reports to the main process that the previous one has ended.
        """
        while (told := self._arms.get()) is not None and self._stop.signal is None:
            arm, schedule.grids = told  # learning rates may have been added since the start
            yield arm
            self._connection.send(arm)


def print_workers() -> contextlib.AbstractContextManager:
    """Return a context in which a worker prints to the terminal."""
    return contextlib.redirect_stdout(sys.__stdout__)


Work = Callable[[StopRequest, Orders], None]
"""The script as a worker runs it; must be picklable."""


def serve(number: int, connection: Connection, prog: str, work: Work) -> None:
    """Run a worker process; an error is reported and ends the process as in a script."""
    if POSIX:
        os.setsid()  # a terminal sends Ctrl-C only to the main process

    def main(_: object, stop: StopRequest) -> None:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            contextlib.suppress(Stopped),  # the main process reports it
        ):
            if POSIX:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the handler of stop requests is installed by now
            work(stop, Orders(number, connection, stop))

    sys.exit(run_script(prog, main))


@dataclass
class Member:
    """A worker process and the arm that it trains."""

    process: BaseProcess
    connection: Connection
    arm: Arm | None = None

    def send(self, what: object) -> None:
        """Send an object to the worker; does nothing if the worker has ended, which `WorkerPool.ended` detects."""
        with contextlib.suppress(OSError):
            self.connection.send(what)


@dataclass
class WorkerPool:
    """The pool of at most `size` worker processes that run `work` until a stop is requested."""

    size: int
    prog: str
    work: Work
    stop: StopRequest
    members: list[Member] = field(default_factory=list)

    @contextlib.contextmanager
    def working(self, arms: int) -> Iterator[int]:
        """Start `size` workers, but not more than `arms`, and yield their number.

        At the end of the context, wait until the workers have exited; after an error, they exit immediately.
        """
        context, size = multiprocessing.get_context("spawn"), min(self.size, arms)
        try:
            for number in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(number, theirs, self.prog, self.work))
                with patch_environment(**share_of(number, size)), signals_blocked():
                    process.start()
                theirs.close()  # so that the main process detects the worker's end
                self.members.append(Member(process, ours))
            yield size
            for member in self.members:
                member.send(None)
                member.process.join()
        finally:
            for member in self.members:
                member.connection.close()
            for member in self.members:
                member.process.join()

    def give(self, arm: Arm, grids: Grids) -> None:
        """Assign an arm to an idle worker, together with the present grids."""
        member = next(member for member in self.members if member.arm is None)
        member.arm = arm
        member.send((arm, grids))

    def ended(self) -> Arm:
        """Wait for an arm to end, and return it.

        Raises `Stopped` if a stop is requested, and `RunFailed` if a worker has ended.
        """
        while self.stop.signal is None:
            ready = wait([member.connection for member in self.members], PATIENCE)
            for member in self.members:
                if member.connection in ready:
                    with contextlib.suppress(EOFError, OSError):
                        arm, member.arm = member.connection.recv(), None
                        return arm
                    self.fail(member)
        self.end()
        raise Stopped("stopped while arms were trained")

    def end(self) -> None:
        """Ask all workers to save and exit, and wait; a second signal ends this process, and thereby the workers."""
        for member in self.members:
            member.send(STOP)
        for member in self.members:
            member.process.join()

    def fail(self, member: Member) -> None:
        """End all workers after one of them, `member`, has ended unexpectedly.

        That worker has reported an error, unless it was killed or asked to stop. Raises `EndedElsewhere` after an
        error, and `RunFailed` if the worker was killed.
        """
        member.process.join()
        self.end()
        status = member.process.exitcode or 0
        if status == 0:
            self.stop.shared(asked=True)
        elif self.stop.signal is None and status > 0:
            raise EndedElsewhere(status)
        elif self.stop.signal is None:
            raise RunFailed(
                f"a process of --arms_at_once was killed by signal {-status}; run the same command to resume"
            )


def arms_a_device(options: SharedExperimentOptions, device: torch.device) -> int:
    """Return the number of arms that are trained in parallel on each GPU, or on the CPU."""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    return -(-(options.arms_at_once or 1) // count)


def share_of(number: int, size: int) -> dict[str, str]:
    """Return a worker's environment variables, which give it a fraction of the CPU cores, and one GPU.

    Worker `number` has GPU `number` modulo the number of GPUs.
    """
    # Both are needed: accelerate treats one thread as not set, and then divides the cores by LOCAL_WORLD_SIZE.
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size)), "LOCAL_WORLD_SIZE": str(size)}
    if (count := torch.cuda.device_count()) == 0:
        return share
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return share | {"CUDA_VISIBLE_DEVICES": visible[number % count]}
