"""Do an experiment's jobs in other processes: on this machine (`LocalExecutor`) or on those of Ray (`ray_executor.py`).

The main process locks the directory, encodes the data, submits jobs and waits for any of them. A process that does jobs
repeats this preparation without output, using the cached encodings.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import patch_environment

from ..errors import RunFailed, Stopped
from ..options.shared import SharedExperimentOptions
from ..runtime.signals import NOT_BEGUN, SIGNALS, StopRequest, signals_blocked

if TYPE_CHECKING:
    from .study import ExperimentStudy

PATIENCE = 0.2  # seconds between two polls for a request to stop
RETRIES = 3  # how often a job is submitted again after its process has died
SEEN_WITHIN = 30.0  # seconds until a file of one machine must be seen by another
STOP = ".stop"  # file in the experiment's directory by which the main process stops the others
POSIX = os.name == "posix"


class Job(NamedTuple):
    """A call that another process makes: `runner.train` with an arm, or another method of the study."""

    name: str
    """`train`, or the name of a method of `ExperimentStudy`."""
    arguments: tuple = ()

    @property
    def what(self) -> str:
        """The arm that the job is about, as text."""
        arm = self.arguments[0] if self.arguments else None
        return f"{arm.label}, learning rate {arm.rate:g}, seed {arm.seed}" if arm else "base model"


class Order(NamedTuple):
    """A job, with what its process must know of the experiment's present state."""

    job: Job
    grids: dict[str, list[float]]
    """Learning rates may have been added since the start."""
    is_first: bool
    """Whether the job is the first one since the start; its process then prints the expected time."""


class Worker(NamedTuple):
    """A process that does jobs."""

    name: str
    """The TensorBoard folder of a process is `process-` and this name."""
    owner: str
    """Identifier of the main process, which has locked the directory."""
    stop: StopRequest


@dataclass(frozen=True)
class Work:
    """What a process does with its jobs; picklable."""

    opened: Callable[[Worker], contextlib.AbstractContextManager[ExperimentStudy]]
    """Function that loads and encodes the data that all jobs share."""
    do: Callable[[Order, ExperimentStudy], Any]
    """Function that does a job, and returns its (picklable) result."""
    owner: str
    folder: Path
    """Directory of the experiment."""


class Died(Exception):
    """The process that did a job has ended without an error: it was killed, or its machine has failed."""


class Lost(RunFailed):
    """The processes that did a job have died, each time that it was submitted."""

    def __init__(self, job: Job, cause: object) -> None:
        advice = "run the same command to try again"
        super().__init__(f"{job.what}: its process died {1 + RETRIES} times ({cause}); {advice}")
        self.job = job
        self.problem = f"{job.what}: its process died {1 + RETRIES} times"


@dataclass
class Executor(ABC):
    """Does jobs in at most `size` other processes at once: `submit` a job, `wait` for any, and `cancel`.

    A job whose process has died is submitted again, RETRIES times: a run then continues from its last checkpoint.
    """

    size: int
    work: Work
    stop: StopRequest
    orders: dict[Future, Order] = field(default_factory=dict)
    """The jobs that have not ended."""
    submitted: int = 0
    deaths: Counter[Job] = field(default_factory=Counter)

    @contextlib.contextmanager
    def working(self) -> Iterator[Executor]:
        """Submit jobs inside this context; at its end, also after an error, no process is left."""
        self.flag.unlink(missing_ok=True)  # of a main process that was killed
        try:
            yield self
        finally:
            self.cancel()
            self.close()
            self.flag.unlink(missing_ok=True)

    @property
    def flag(self) -> Path:
        """File that requests all processes to stop."""
        return self.work.folder / STOP

    @property
    def is_full(self) -> bool:
        """Whether as many jobs are submitted as may be done at once."""
        return len(self.orders) == self.size

    def submit(self, job: Job, grids: dict[str, list[float]]) -> None:
        """Let another process do a job."""
        order = Order(job, grids, is_first=not self.submitted)
        self.submitted += 1
        self.orders[self.start(order)] = order

    def wait(self) -> tuple[Job, Any]:
        """Wait until any job ends, and return it with its result.

        Raises the error of the job; `Lost` if its processes have died; and `Stopped` once all runs are saved, if a stop
        was requested.
        """
        while self.stop.signal is None:
            done, _ = wait(self.orders, PATIENCE, FIRST_COMPLETED)
            for future in done:
                order = self.orders.pop(future)
                try:
                    return order.job, self.result_of(future)
                except Stopped:  # a batch system has signaled only that process
                    self.stop.shared(asked=True)
                except Died as cause:
                    self.deaths[order.job] += 1
                    if self.deaths[order.job] > RETRIES:
                        raise Lost(order.job, cause) from None
                    count = f"time {self.deaths[order.job]} of {RETRIES}"
                    print(f"{order.job.what}: its process died ({cause}); submitted again, {count}", flush=True)
                    self.orders[self.start(order)] = order
        self.cancel()
        raise Stopped("stopped while runs were trained")

    def each(
        self, jobs: Iterable[Job], grids: dict[str, list[float]], on_start: Callable[[Job], object]
    ) -> Iterator[tuple[Job, Any]]:
        """Do the jobs, and yield each job with its result as soon as it ends; `on_start` is called before a job is
        submitted.
        """
        todo = deque(jobs)
        while todo or self.orders:
            while todo and not self.is_full:
                on_start(todo[0])
                self.submit(todo.popleft(), grids)
            yield self.wait()

    def cancel(self) -> None:
        """Request all processes to save and end their jobs, and wait; a second signal ends them immediately."""
        if self.orders:
            self.flag.touch()
            wait(self.orders)
            self.orders.clear()

    @abstractmethod
    def start(self, order: Order) -> Future:
        """Start a job in another process."""

    @abstractmethod
    def result_of(self, future: Future) -> Any:
        """Return the result of a job that has ended; raises its error, or `Died`."""

    @abstractmethod
    def close(self) -> None:
        """End the processes, which have no job."""


def wait_for_file(path: Path) -> None:
    """Wait until a file that another process has written is seen here; raises `RunFailed` after SEEN_WITHIN seconds."""
    end = time.monotonic() + SEEN_WITHIN
    # a network drive may remember for a while that the file was missing, but lists a directory anew
    while not (path.parent.is_dir() and path in path.parent.iterdir()):
        if time.monotonic() > end:
            problem = f"another process has written it, but it is not seen here after {SEEN_WITHIN:g} s"
            raise RunFailed(f"{path}: {problem}; --output_dir must be on storage that all machines share")
        time.sleep(PATIENCE)


@contextlib.contextmanager
def errors_picklable() -> Iterator[None]:
    """Replace an error that the main process could not read, by one with its message."""
    try:
        yield
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


# -- on this machine ---------------------------------------------------------------------------------------------------


@dataclass
class LocalExecutor(Executor):
    """Does jobs in processes of this machine; each has one GPU, or its share of the CPU cores.

    Every process is a pool of its own: so the death of one does not end the others, and its successor has its place.
    """

    pools: dict[int, ProcessPoolExecutor] = field(default_factory=dict)
    places: dict[Future, int] = field(default_factory=dict)

    def start(self, order: Order) -> Future:
        """Start a job in an idle process, or in a new one."""
        place = min({*range(self.size)} - {self.places[future] for future in self.orders})
        try:
            future = self.give(place, order)
        except BrokenProcessPool:  # it has died, also if it was idle
            del self.pools[place]
            future = self.give(place, order)
        self.places[future] = place
        return future

    def give(self, place: int, order: Order) -> Future:
        """Submit a job to the pool of a place, whose process starts with the first job."""
        if place not in self.pools:
            context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
            self.pools[place] = ProcessPoolExecutor(1, context, begin_process, (self.work, str(place)))
        with patch_environment(**share_of(place, self.size)), signals_blocked():
            return self.pools[place].submit(do_in_process, order)

    def result_of(self, future: Future) -> Any:
        """Return the result of a job that has ended; raises its error, or `Died`."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise Died("killed, or out of memory") from None

    def close(self) -> None:
        """End the processes, and wait until they have ended."""
        for pool in self.pools.values():
            pool.shutdown()


@dataclass
class Process:
    """The state of a process of `LocalExecutor`."""

    work: Work
    worker: Worker
    study: ExperimentStudy | None = None
    """What its first job has opened."""


_THIS: list[Process] = []


def begin_process(work: Work, name: str) -> None:
    """Prepare a process for its jobs: it stops as requested, and ends if the main process ends.

    The directory is then no longer locked, and must not be written to.
    """
    if POSIX:
        os.setsid()  # a terminal sends Ctrl-C only to the main process
    threading.Thread(target=end_with_parent, daemon=True).start()
    worker = Worker(name, work.owner, StopRequest(work.folder / STOP).__enter__())
    if POSIX:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # they have handlers now
    _THIS.append(Process(work, worker))


def end_with_parent() -> None:
    """End this process as soon as the main process ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def do_in_process(order: Order) -> Any:
    """Do a job in a process of `LocalExecutor`, with the study that its first job has opened."""
    (this,) = _THIS
    with errors_picklable():
        this.worker.stop.check(NOT_BEGUN)
        if this.study is None:
            stack = contextlib.ExitStack()
            atexit.register(stack.close)
            this.study = stack.enter_context(this.work.opened(this.worker))
        return this.work.do(order, this.study)


def arms_a_device(options: SharedExperimentOptions, device: torch.device) -> int:
    """Return the number of arms that are trained in parallel on each GPU, or on the CPU.

    With Ray, this number is a lower bound for the CPU cores of each machine.
    """
    if options.executor == "ray":
        return int(1 / (options.gpus_per_run or 1)) if device.type == "cuda" else 1
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    return -(-(options.arms_at_once or 1) // count)


def share_of(number: int, size: int) -> dict[str, str]:
    """Return a process's environment variables, which give it a fraction of the CPU cores, and one GPU.

    Process `number` has GPU `number` modulo the number of GPUs.
    """
    # Both variables are needed: accelerate treats one thread as not set, and then divides the cores by
    # LOCAL_WORLD_SIZE.
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // size)), "LOCAL_WORLD_SIZE": str(size)}
    if (count := torch.cuda.device_count()) == 0:
        return share
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return share | {"CUDA_VISIBLE_DEVICES": visible[number % count]}
