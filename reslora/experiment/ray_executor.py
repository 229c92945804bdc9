"""Do an experiment's jobs on the machines of a Ray cluster, which share the storage of the output directory."""

import contextlib
import os
import platform
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import RunFailed, first_line, refused_as
from ..io import this_process
from ..options.shared import SharedExperimentOptions
from ..runtime.signals import NOT_BEGUN, StopRequest
from .executors import STOP, Died, Executor, Order, Work, Worker, errors_picklable, wait_for_file

DIED = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
CONNECTED_WITHIN = 10.0  # seconds


@contextlib.contextmanager
def connected(options: SharedExperimentOptions, folder: Path) -> Iterator[None]:
    """Connect to the Ray cluster, and check that its machines share the directory.

    Raises `InvalidArgument` without a cluster, and `RunFailed` for a directory that is not shared.
    """
    handler = signal.getsignal(signal.SIGTERM)
    fix = "start a cluster by `ray start --head`, or give the address of one"
    host, _, port = options.ray_address.rpartition(":")
    with refused_as(f"--ray_address {options.ray_address}", fix):
        if host and "://" not in options.ray_address:  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECTED_WITHIN).close()
        ray.init(options.ray_address, logging_level="warning")
    signal.signal(signal.SIGTERM, handler)  # Ray's handler would end this process
    try:
        check_shared(folder)
        yield
    finally:
        ray.shutdown()


def check_shared(folder: Path) -> None:
    """Raise `RunFailed` unless every machine sees this one's files in the directory, and the other way round."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    ours = folder / f".shared-{this_process()}"
    written = [ours]
    try:
        ours.touch()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        for node in nodes:
            at = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = ray.remote(num_cpus=0, scheduling_strategy=at)(answer_file).remote(Path.cwd(), ours)
            try:
                written.append(ray.get(answer))
            except RayTaskError as error:
                where = f"--executor ray, machine {node['NodeManagerHostname']}"
                cause = error.cause
                raise cause if isinstance(cause, RunFailed) else RunFailed(f"{where}: {first_line(cause)}") from None
            except RayError:  # it has failed, which Ray has not noticed yet: no run will be there
                continue
            wait_for_file(written[-1])
    finally:
        for path in written:
            path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def answer_file(start: Path, path: Path) -> Path:
    """Write a file next to `path`, on any machine, and return its path; `start`: the main process's directory."""
    enter(start)
    wait_for_file(path.absolute())
    answer = path.with_name(f"{path.name}-{platform.node()}-{os.getpid()}")
    answer.touch()
    return answer


def enter(start: Path) -> None:
    """Change to the directory in which the main process was started, so that relative paths mean the same."""
    try:
        os.chdir(start)
    except OSError as error:
        problem = f"cannot be entered on machine {platform.node()} ({error.strerror})"
        raise RunFailed(f"{start} {problem}; start the command in a directory that all machines share") from None


@dataclass
class RayExecutor(Executor):
    """Does each job as a task of Ray, which chooses the machine and reserves its CPU cores and GPUs."""

    gpus: float | None = None
    """GPUs of a job; None: one, if the cluster has any."""

    def __post_init__(self) -> None:
        # A number that does not depend on the machines: results on a CPU depend on the number of threads.
        threads = int(os.environ.get("OMP_NUM_THREADS", 1))
        gpus = self.gpus if self.gpus is not None else float("GPU" in ray.cluster_resources())
        environment = {"OMP_NUM_THREADS": str(threads)}
        make = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0, runtime_env={"env_vars": environment})
        self.task, self.shared = make(do_in_ray), ray.put((Path.cwd(), self.work))

    def start(self, order: Order) -> Future:
        """Start a task, as soon as a machine is free."""
        return self.task.remote(self.shared, order).future()

    def result_of(self, future: Future) -> Any:
        """Return the result of a task that has ended; raises its error, or `Died`."""
        try:
            return future.result()
        except DIED as error:
            problem, _, _ = first_line(error).partition(". ")  # without Ray's advice, which follows
            raise Died(problem) from None
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise RunFailed(f"--executor ray: {first_line(error)}; run the same command to resume") from None

    def close(self) -> None:
        """Do nothing: Ray ends processes without a task."""


def do_in_ray(shared: tuple[Path, Work], order: Order) -> Any:
    """Do a job in a process of Ray, which loads and encodes everything for this job only."""
    start, work = shared
    with errors_picklable():
        enter(start)
        stop = StopRequest(work.folder / STOP)
        stop.check(NOT_BEGUN)
        with work.opened(Worker(f"{platform.node()}-{os.getpid()}", work.owner, stop)) as study:
            return work.do(order, study)
