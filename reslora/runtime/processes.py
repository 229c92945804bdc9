"""Coordinate the processes of a distributed run: the main process decides and broadcasts, and the others wait for it.

One process must make every decision that leads to a collective operation. If each process asked its own disk, clock or
signal handler, they could enter different collective operations and wait forever. In a run with a single process, no
function of this module communicates.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ..errors import Diverged, EndedElsewhere, InvalidArgument, RunFailed, Stopped, another_ended
from .signals import StopRequest

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=24)  # for work of the main process alone: to encode, merge, sample and read back
_DECIDING = ContextVar("deciding", default=False)


def is_single_process() -> bool:
    """Return whether this process is the only process of its run."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def is_main() -> bool:
    """Return whether this is the main process, which decides, writes and prints."""
    return is_single_process() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print a line only in the main process."""
    if is_main():
        print(text, flush=True)


def broadcast_from_main(decide: Callable[[], T]) -> T:
    """Call `decide` in the main process, and return its result in every process.

    The remaining processes wait, even for hours. The result must be picklable. If `decide` raises an error, the other
    processes raise `EndedElsewhere`. `decide` must not call functions of this module that involve the other processes,
    because they do not run it.
    """
    if is_single_process():
        return _by_itself(decide)
    value, failure = _tried(lambda: _by_itself(decide)) if is_main() else (None, None)
    told: list = [(value, failure and _status(failure), isinstance(failure, Diverged))]
    wait()
    _collective(lambda: dist.broadcast_object_list(told, src=0, group=_patient()))
    if failure is not None:
        raise failure
    value, status, diverged = told[0]
    if status is not None:
        raise EndedElsewhere(status, diverged)
    return value


def on_all(do: Callable[[], T]) -> T:
    """Call `do` in every process, and return this process's result.

    If `do` raises an error in a process, this process raises the error, and all others raise `EndedElsewhere`.
    """
    if is_single_process():
        return do()
    value, failure = _tried(do)
    wait()
    statuses = [status for status in all_gather(None if failure is None else _status(failure)) if status is not None]
    if failure is not None:
        raise failure
    if statuses:
        raise EndedElsewhere(statuses[0])
    return value


def all_gather(value: T) -> list[T]:
    """Return the (picklable) values of all processes, by rank."""
    if is_single_process():
        return [value]
    values: list = [None] * dist.get_world_size()
    _collective(lambda: dist.all_gather_object(values, value, group=_patient()))
    return values


def any_of(condition: bool) -> bool:
    """Return whether the condition holds in any process, without synchronizing a GPU."""
    return any_of_each([condition])[0]


def any_of_each(conditions: Sequence[bool]) -> list[bool]:
    """Return which of the conditions hold in any process."""
    return [any(found) for found in zip(*all_gather(conditions), strict=True)]


def stop_requested(stop: StopRequest) -> bool:
    """Return whether any process was asked to stop; all processes must call this together and use its result."""
    return stop.shared(any_of(stop.signal is not None))


def wait() -> None:
    """Wait for all processes. Unlike a collective operation, this does not block Python's signal handlers."""
    if not is_single_process():
        _collective(_wait)


def _wait() -> None:
    work, pause = dist.barrier(group=_patient(), async_op=True), 0.001
    while not work.is_completed():
        time.sleep(pause)
        pause = min(0.1, 1.5 * pause)
    work.wait()


def leave(everyone: bool) -> None:
    """Destroy the process groups.

    `everyone`: whether all processes call this. If not, the process group on GPUs is not destroyed, because destroying
    it would wait for the other processes.
    """
    patient = list(_PATIENT.values())
    _PATIENT.clear()
    if not (dist.is_available() and dist.is_initialized()):
        return
    gc.collect()  # otherwise a wrapped model in an exception's frames would wait for the group when it is freed
    if everyone or dist.get_backend() == "gloo":
        dist.destroy_process_group()
    else:
        for group in patient:
            dist.destroy_process_group(group)


_PATIENT: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _patient() -> dist.ProcessGroup:
    """Return a gloo group of all processes with the timeout `LONGEST_WAIT`; that of groups on GPUs is ten minutes."""
    world = dist.group.WORLD
    if world not in _PATIENT:
        _PATIENT[world] = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _PATIENT[world]


def _by_itself(decide: Callable[[], T]) -> T:
    """Call `decide` and return its result; raise `AssertionError` if it enters a collective operation."""
    _refuse_to_meet()
    token = _DECIDING.set(True)
    try:
        return decide()
    finally:
        _DECIDING.reset(token)


def _refuse_to_meet() -> None:
    assert not _DECIDING.get(), "`decide` enters a collective operation, but the other processes wait for its result"


def _tried(do: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return do(), None
    except Exception as error:  # raised again once the other processes know
        return None, error


def _status(error: Exception) -> int:
    if isinstance(error, InvalidArgument):
        return 2
    return 143 if isinstance(error, Stopped) else 1


def _collective(call: Callable[[], object]) -> None:
    _refuse_to_meet()
    try:
        call()
    except RuntimeError as error:
        raise RunFailed(another_ended(error)) from None
