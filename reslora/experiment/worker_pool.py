"""Train, test and export several arms in parallel, each in a worker process.

The main process locks the directory, encodes the data, assigns jobs to workers and waits for them. A worker repeats
this preparation without output, using the cached encodings, and then does the jobs assigned to it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import patch_environment

from ..errors import EndedElsewhere, RunFailed, Stopped
from ..options.shared import SharedExperimentOptions
from ..runtime.script import run_script
from ..runtime.signals import SIGNALS, StopRequest, signals_blocked
from .arms import Grids

if TYPE_CHECKING:
    from .schedule import ArmSchedule

PATIENCE = 0.2  # seconds between two polls for a request to stop
STOP = "stop"
POSIX = os.name == "posix"


class Job(NamedTuple):
    """A call that a worker makes: `runner.train` with an arm, or another method of the study."""

    name: str
    """`train`, or the name of a method of `ExperimentStudy`."""
    arguments: tuple = ()


class Orders:
    """A worker's connection to the main process, which assigns jobs to the worker.

    The worker exits if the main process ends: the directory is then no longer locked, and must not be written to.
    """

    def __init__(self, number: int, connection: Connection, stop: StopRequest) -> None:
        self.number = number
        self._connection, self._stop = connection, stop
        self._jobs: queue.SimpleQueue[tuple[Job, dict[str, list[float]]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                told = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)
            if told == STOP:
                self._stop.signal, told = signal.SIGTERM, None
            self._jobs.put(told)

    def jobs(self, schedule: ArmSchedule) -> Iterator[Job]:
        """Yield the jobs as they arrive, until a stop; `report` each one's result before the next."""
        while (told := self._jobs.get()) is not None and self._stop.signal is None:
            job, schedule.grids = told  # learning rates may have been added since the start
            yield job

    def report(self, result: object) -> None:
        """Report to the main process that the job has ended with this (picklable) result."""
        self._connection.send(result)


def print_workers() -> contextlib.AbstractContextManager:
    """Return a context in which a worker prints to the terminal."""
    return contextlib.redirect_stdout(sys.__stdout__)


Work = Callable[[StopRequest, Orders], None]
"""The script as a worker runs it; must be picklable."""


def serve(number: int, connection: Connection, prog: str, work: Work) -> None:
    """Run a worker process; an error is reported and ends the process as in a script."""
    if POSIX:
        os.setsid()  # a terminal sends Ctrl-C only to the main process

    def run_worker(_: object, stop: StopRequest) -> None:
        """Do the work of this process, without output, until all jobs are done or a stop is requested."""
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            contextlib.suppress(Stopped),  # the main process reports it
        ):
            if POSIX:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the handler of stop requests is installed by now
            work(stop, Orders(number, connection, stop))

    sys.exit(run_script(prog, run_worker))


@dataclass
class Member:
    """A worker process and its present job."""

    process: BaseProcess
    connection: Connection
    job: Job | None = None

    def send(self, what: object) -> None:
        """Send an object to the worker; does nothing if the worker has ended, which `WorkerPool.ended` detects."""
        with contextlib.suppress(OSError):
            self.connection.send(what)


@dataclass
class WorkerPool:
    """The pool of at most `size` worker processes that run `work` until a stop is requested.

    A worker is started when a job is assigned and no other worker is idle.
    """

    size: int
    prog: str
    work: Work
    stop: StopRequest
    members: list[Member] = field(default_factory=list)

    @contextlib.contextmanager
    def working(self) -> Iterator[WorkerPool]:
        """Assign jobs inside this context.

        At its end, wait until the workers have exited; after an error, they exit immediately.
        """
        try:
            yield self
            for member in self.members:
                member.send(None)
                member.process.join()
        finally:
            for member in self.members:
                member.connection.close()
            for member in self.members:
                member.process.join()

    @property
    def is_full(self) -> bool:
        """Whether all workers are busy and no further one may be started."""
        return len(self.busy) == self.size

    @property
    def busy(self) -> list[Member]:
        """The workers that have a job."""
        return [member for member in self.members if member.job is not None]

    def give(self, job: Job, grids: Grids) -> None:
        """Assign a job to a worker, together with the present grids."""
        member = next((member for member in self.members if member.job is None), None) or self.start()
        member.job = job
        member.send((job, grids))

    def start(self) -> Member:
        """Start another worker."""
        context, number = multiprocessing.get_context("spawn"), len(self.members)
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(number, theirs, self.prog, self.work))
        with patch_environment(**share_of(number, self.size)), signals_blocked():
            process.start()
        theirs.close()  # so that the main process detects the worker's end
        self.members.append(Member(process, ours))
        return self.members[-1]

    def ended(self) -> tuple[Job, Any]:
        """Wait for a job to end, and return it with its result.

        Raises `Stopped` if a stop is requested, and `RunFailed` if a worker has ended.
        """
        while self.stop.signal is None:
            ready = wait([member.connection for member in self.members], PATIENCE)
            for member in self.members:
                if member.connection in ready:
                    with contextlib.suppress(EOFError, OSError):
                        result, job, member.job = member.connection.recv(), member.job, None
                        assert job is not None
                        return job, result
                    self.fail(member)
        self.end()
        raise Stopped("stopped while runs were trained")

    def each(self, jobs: Iterable[Job], grids: Grids, on_start: Callable[[Job], object]) -> Iterator[tuple[Job, Any]]:
        """Do the jobs, and yield each with its result as it ends; `on_start` is called before a job is assigned."""
        todo = deque(jobs)
        while todo or self.busy:
            while todo and not self.is_full:
                on_start(todo[0])
                self.give(todo.popleft(), grids)
            yield self.ended()

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
