"""Waits with a time limit and a message; the limit is for a process that hangs, not for a slow one."""

import multiprocessing
import signal
import subprocess
import threading
import time
from collections.abc import Callable

LIMIT = 600
"""Seconds. Also the `timeout` of every `subprocess.run` here."""

Running = subprocess.Popen | multiprocessing.process.BaseProcess | threading.Thread


def wait_until(
    condition: Callable[[], object],
    what: str,
    running: Running | None = None,
    pause: float = 0.02,
    limit: float = LIMIT,
) -> None:
    """Poll until the condition holds; fail after the limit, or if the process to wait for has ended."""
    end = time.monotonic() + limit
    while not condition():
        assert running is None or is_running(running) or condition(), f"ended before {what}"
        assert time.monotonic() < end, f"waited {limit} s for {what}"
        time.sleep(pause)


def is_running(running: Running) -> bool:
    return running.poll() is None if isinstance(running, subprocess.Popen) else running.is_alive()


def ended(process: subprocess.Popen | multiprocessing.process.BaseProcess, limit: float = LIMIT) -> int:
    """Return the exit status of a process, minus the signal if one ended it; kill a process that hangs, and fail."""
    try:
        wait_until(lambda: not is_running(process), f"the end of {process}", limit=limit)
    finally:
        if is_running(process):
            process.kill()
    if isinstance(process, subprocess.Popen):
        return process.wait(limit)
    process.join(limit)
    return process.exitcode


def output_of(process: subprocess.Popen, given: str | bytes | None = None, limit: float = LIMIT) -> tuple:
    """Return stdout and stderr of a process with pipes; kill a process that hangs, and fail."""
    try:
        return process.communicate(given, timeout=limit)
    finally:
        if process.poll() is None:
            process.kill()


def start_thread(target: Callable, *args: object) -> threading.Thread:
    """Start a daemon thread, which does not keep the tests from ending."""
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), f"{thread} does not end"


def default_sigint() -> None:
    """Restore the default SIGINT handler in a child (`preexec_fn`), as children inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_sigint() -> None:
    """Ignore SIGINT in a child (`preexec_fn`), as in a child of a background shell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
