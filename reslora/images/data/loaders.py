"""Options and error handling of torch's DataLoader: signals, and worker processes that die."""

import multiprocessing
import signal
from collections.abc import Generator

from torch.utils.data import DataLoader

from ...errors import RunFailed, first_line
from ...runtime.folder_lock import check_held
from ...runtime.signals import SIGNALS


def worker_options(count: int) -> dict:
    """Return `DataLoader` arguments for `count` worker processes, which ignore the signals that the trainer handles."""
    if count == 0:
        return {"num_workers": 0}
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return {"num_workers": count, "worker_init_fn": _ignore_signals, "multiprocessing_context": fork}


def _ignore_signals(worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stream(loader: DataLoader) -> Generator:
    """Yield the items of a loader; raises `RunFailed` if an item cannot be loaded or a worker process dies.

    Close the generator if it is not read to its end: the workers ignore SIGTERM, and exit only when it shuts them down.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except (OSError, EOFError, RuntimeError, SyntaxError, ValueError) as error:
        check_held()  # a file may be missing because the run's folder was moved
        raise RunFailed(_what_failed(error, loader.num_workers)) from None
    finally:
        if loader.num_workers:
            # torch shuts the workers down in garbage collection, which a stored traceback prevents.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _what_failed(error: Exception, processes: int) -> str:
    intact = "the last checkpoint is intact"
    if processes and " in DataLoader worker process " not in str(error):  # else: an error that a living worker raised
        fix = "give fewer, or more memory"
        return f"--dataloader_num_workers {processes}: a process that loads images has died; {fix}; {intact}"
    lines = str(error).strip().splitlines() if processes else []  # the last line of a traceback is `type: message`
    problem = lines[-1].partition(": ")[2] if lines else first_line(error)
    if isinstance(error, RunFailed):
        return f"{problem}: {intact}"
    return f"a batch cannot be loaded ({problem}); restore the file, and resume: {intact}"
