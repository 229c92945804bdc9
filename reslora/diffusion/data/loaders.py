"""torch's DataLoader as every use of it has it: who answers signals, and what becomes of a process that dies."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Iterator

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ...common.errors import RunFailed, first_line
from ...common.signals import SIGNALS


def worker_options(count: int) -> dict:
    """Arguments for `count` loading processes, which leave it to the trainer to answer signals."""
    if count == 0:
        return {"num_workers": 0}
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return {"num_workers": count, "worker_init_fn": _ignore_signals, "multiprocessing_context": fork}


def _ignore_signals(worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stream(loader: DataLoader) -> Generator:
    """What a loader yields; an item that cannot be loaded, or a process that died, is `RunFailed` in one line.

    Close it when it is not read to its end: its processes ignore SIGTERM, and leave only when they are told.
    """
    iterator = _iterator(loader)
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (OSError, EOFError, RuntimeError, SyntaxError, ValueError) as error:
                raise RunFailed(_what_failed(error, loader.num_workers)) from None
            yield item
    finally:
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()  # as when torch's iterator is collected, which a kept traceback prevents


def _iterator(loader: DataLoader) -> Iterator:
    """The loader's own iterator, without torch's handler of dead children: that raises wherever the program is then.

    Without it the next item tells.
    """
    number = getattr(signal, "SIGCHLD", None) if loader.num_workers else None
    if number is None:
        return iter(loader)
    handler = signal.getsignal(number)
    iterator = iter(loader)
    signal.signal(number, signal.SIG_DFL if handler is None else handler)
    return iterator


def _what_failed(error: Exception, processes: int) -> str:
    intact = "the last checkpoint is intact"
    if processes and " in DataLoader worker process " not in str(error):  # what a process says that lives on
        fix = "give fewer, or more memory"
        return f"--dataloader_num_workers {processes}: a process that loads images has died; {fix}; {intact}"
    lines = str(error).strip().splitlines() if processes else []
    return f"a batch cannot be loaded ({lines[-1] if lines else first_line(error)}); {intact}"
