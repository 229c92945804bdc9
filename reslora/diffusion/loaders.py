"""Options of torch's DataLoader that every use of it shares."""

from __future__ import annotations

import multiprocessing
import signal


def worker_options(count: int) -> dict:
    """Arguments for `count` loading processes, which leave it to the trainer to answer Ctrl-C and SIGTERM."""
    if count == 0:
        return {"num_workers": 0}
    fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return {"num_workers": count, "worker_init_fn": _ignore_signals, "multiprocessing_context": fork}


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
