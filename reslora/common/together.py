"""What several processes of one run do together: one decides and tells the others, and they wait for each other.

Whatever leads to a collective must be decided by one process. Each asking its own disk, clock or signal handler would
have them meet different collectives, and wait for each other for ever. Alone, everything here is a plain call.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import Diverged, EndedElsewhere, InvalidArgument, RunFailed, Stopped, another_ended

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=24)  # for the main process to encode, merge, draw and read back
_DECIDING = ContextVar("deciding", default=False)


def alone() -> bool:
    """Return whether this is the only process of its run."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def is_main() -> bool:
    """Return whether this is the process that decides, writes and prints."""
    return alone() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print once, however many processes and machines there are."""
    if is_main():
        print(text, flush=True)


def decided(decide: Callable[[], T]) -> T:
    """What the main process returns from `decide`, in every process; the others wait, however long it takes.

    The value must be picklable. What the main process raises ends the others too, as `EndedElsewhere`. Nothing of this
    module that meets the others may be called from `decide`, which they do not run.
    """
    if alone():
        return _by_itself(decide)
    value, failure = _tried(lambda: _by_itself(decide)) if is_main() else (None, None)
    told: list = [(value, failure and _status(failure), isinstance(failure, Diverged))]
    wait()
    _met(lambda: dist.broadcast_object_list(told, src=0, group=_patient()))
    if failure is not None:
        raise failure
    value, status, diverged = told[0]
    if status is not None:
        raise EndedElsewhere(status, diverged)
    return value


def each(do: Callable[[], T]) -> T:
    """What this process returns from `do`, which every process calls; where it fails for one, it ends all.

    Every process raises its own error, and `EndedElsewhere` where it has none.
    """
    if alone():
        return do()
    value, failure = _tried(do)
    wait()
    statuses = [status for status in gathered(None if failure is None else _status(failure)) if status is not None]
    if failure is not None:
        raise failure
    if statuses:
        raise EndedElsewhere(statuses[0])
    return value


def gathered(value: T) -> list[T]:
    """Return the value of each process, which must be picklable, by rank."""
    if alone():
        return [value]
    values: list = [None] * dist.get_world_size()
    _met(lambda: dist.all_gather_object(values, value, group=_patient()))
    return values


def any_of(condition: bool) -> bool:
    """Return whether the condition holds in any process. It costs no synchronisation with a GPU."""
    return any_of_each([condition])[0]


def any_of_each(conditions: Sequence[bool]) -> list[bool]:
    """Return which of the conditions hold in any process, by one exchange."""
    if alone():
        return list(conditions)
    numbers = torch.tensor(conditions, dtype=torch.float32)
    _met(lambda: dist.all_reduce(numbers, group=_patient()))
    return (numbers > 0).tolist()


def wait() -> None:
    """Until every process is here. Signals are heard meanwhile, which inside a collective they are not."""
    if not alone():
        _met(_wait)


def _wait() -> None:
    work, pause = dist.barrier(group=_patient(), async_op=True), 0.001
    while not work.is_completed():
        time.sleep(pause)
        pause = min(0.1, 1.5 * pause)
    work.wait()


def leave(everyone: bool) -> None:
    """Leave the groups of processes; where not `everyone` does, a GPU's group, which would wait, is left alone."""
    patient = list(_PATIENT.values())
    _PATIENT.clear()
    if not (dist.is_available() and dist.is_initialized()):
        return
    gc.collect()  # a wrapped model that an exception's frames still hold would wait for the group as it goes
    if everyone or dist.get_backend() == "gloo":
        dist.destroy_process_group()
    else:
        for group in patient:
            dist.destroy_process_group(group)


_PATIENT: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _patient() -> dist.ProcessGroup:
    """Return all processes, by gloo whatever trains, for waits that outlast the ten minutes of a collective on GPUs."""
    world = dist.group.WORLD
    if world not in _PATIENT:
        _PATIENT[world] = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _PATIENT[world]


def _by_itself(decide: Callable[[], T]) -> T:
    """What `decide` returns; it is found out meanwhile where it would meet the others."""
    _refuse_to_meet()
    token = _DECIDING.set(True)
    try:
        return decide()
    finally:
        _DECIDING.reset(token)


def _refuse_to_meet() -> None:
    assert not _DECIDING.get(), "a decision meets the other processes, which wait for its end"


def _tried(do: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return do(), None
    except Exception as error:  # raised again once the others know
        return None, error


def _status(error: Exception) -> int:
    if isinstance(error, InvalidArgument):
        return 2
    return 143 if isinstance(error, Stopped) else 1


def _met(meet: Callable[[], object]) -> None:
    _refuse_to_meet()
    try:
        meet()
    except RuntimeError as error:
        raise RunFailed(another_ended(error)) from None
