"""Arms that are trained at once, each by a process of its own, a member of the crew.

The main process trains none then: it has locked the folder, encoded everything, hands out arms and waits for them. A
member does what it does up to the first arm, without a word and with nothing left to encode, and then trains what it is
given.
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

from ..common.errors import EndedElsewhere, RunFailed, Stopped
from ..common.script import run_script
from ..common.signals import SIGNALS, StopRequest, signals_blocked
from ..options.shared import SharedExperimentOptions
from .arms import Arm, Grids

if TYPE_CHECKING:
    from .course import Course

PATIENCE = 0.2  # seconds between two looks for a request to stop
STOP = "stop"
POSIX = os.name == "posix"


class Orders:
    """What a member is told by the main process. Once that is gone, with its lock, nothing more may be written."""

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

    def arms(self, course: Course) -> Iterator[Arm]:
        """The arms to train, as they come, until a stop; each counts as ended when the next one is asked for."""
        while (told := self._arms.get()) is not None and self._stop.signal is None:
            arm, course.grids = told  # which may have grown since the start
            yield arm
            self._connection.send(arm)


def heard() -> contextlib.AbstractContextManager:
    """Inside, what a member prints is heard."""
    return contextlib.redirect_stdout(sys.__stdout__)


Work = Callable[[StopRequest, Orders], None]
"""The script as a member has it; must be picklable."""


def serve(number: int, connection: Connection, prog: str, work: Work) -> None:
    """A member's process, whose errors are told and end it as a script's do."""
    if POSIX:
        os.setsid()  # a terminal asks the main process alone to stop

    def main(_: object, stop: StopRequest) -> None:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            contextlib.suppress(Stopped),  # which the main process tells
        ):
            if POSIX:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the request to stop listens by now
            work(stop, Orders(number, connection, stop))

    sys.exit(run_script(prog, main))


@dataclass
class Member:
    """A process, and the arm that it trains."""

    process: BaseProcess
    connection: Connection
    arm: Arm | None = None

    def tell(self, what: object) -> None:
        """Send it something; one that has ended is found out by who waits for it."""
        with contextlib.suppress(OSError):
            self.connection.send(what)


@dataclass
class Crew:
    """The processes of `work`, at most `size`, until a stop is asked for."""

    size: int
    prog: str
    work: Work
    stop: StopRequest
    members: list[Member] = field(default_factory=list)

    @contextlib.contextmanager
    def working(self, arms: int) -> Iterator[int]:
        """Start them, not more than there are arms, and end them: where something has failed, at once. How many."""
        context, size = multiprocessing.get_context("spawn"), min(self.size, arms)
        try:
            for number in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(number, theirs, self.prog, self.work))
                with patch_environment(**share_of(number, size)), signals_blocked():
                    process.start()
                theirs.close()  # so that its end is heard here
                self.members.append(Member(process, ours))
            yield size
            for member in self.members:
                member.tell(None)
                member.process.join()
        finally:
            for member in self.members:
                member.connection.close()
            for member in self.members:
                member.process.join()

    def give(self, arm: Arm, grids: Grids) -> None:
        """Has one that trains nothing train an arm, in the grids as they are by now."""
        member = next(member for member in self.members if member.arm is None)
        member.arm = arm
        member.tell((arm, grids))

    def ended(self) -> Arm:
        """Wait for an arm to end, and return it; raises where a stop is asked for or a member has ended."""
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
        """Ask all to save and leave, and wait until they have; a second signal ends this process, and so them."""
        for member in self.members:
            member.tell(STOP)
        for member in self.members:
            member.process.join()

    def fail(self, member: Member) -> None:
        """End all for one that has ended by itself; it has said why, unless it was killed or asked to stop."""
        member.process.join()
        self.end()
        status = member.process.exitcode or 0
        if status == 0:
            self.stop.shared(asked=True)
        elif self.stop.signal is None and status > 0:
            raise EndedElsewhere(status)
        elif self.stop.signal is None:
            raise RunFailed(f"a process of --arms_at_once was killed by signal {-status}; the same command goes on")


def arms_a_device(options: SharedExperimentOptions, device: torch.device) -> int:
    """Return how many arms are trained at once on a GPU, or on the CPU."""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    return -(-(options.arms_at_once or 1) // count)


def share_of(number: int, size: int) -> dict[str, str]:
    """Return the environment of a member: its share of the cores, and one GPU after the other."""
    # Both: below accelerate's launcher one thread counts as none chosen, and cores are shared by local processes.
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size)), "LOCAL_WORLD_SIZE": str(size)}
    if (count := torch.cuda.device_count()) == 0:
        return share
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return share | {"CUDA_VISIBLE_DEVICES": visible[number % count]}
