"""Run a training script in a separate process, and record time and memory after each of its optimizer steps.

`Watched(script, flags, folder)` starts this file as `python watched.py RECORD SCRIPT FLAG ...`. It imports nothing,
torch above all, that the script may need to configure before importing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP = 5  # steps that are not timed


def probe(record: Path, script: str, flags: list[str]) -> None:
    """Run a training script in this process, and record time and memory after each optimizer step."""
    began, marks = time.perf_counter(), []

    def record_step(*_) -> None:
        """Record the time since the start, and the memory in use and at its peak, in bytes."""
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        marks.append((time.perf_counter() - began, torch.cuda.memory_allocated() if cuda else resident(), peak))

    after_import("torch.optim.optimizer", lambda module: module.register_optimizer_step_post_hook(record_step))
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        record.write_text(json.dumps(marks))


def after_import(name: str, action: Callable) -> None:
    """Call `action` with a module after the script has imported it, so that this file need not import it."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, wanted, path, target=None):
            """Return the module's spec, whose loader then calls `action`; None for other modules."""
            if wanted != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), action(module))
            return spec

    sys.meta_path.insert(0, Finder())


def anonymous(process: int) -> int:
    """Return the bytes of a process's private memory; 0 if unknown."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class PeakAnonymous(threading.Thread):
    """Polls a process's private memory, because the system records no peak of it."""

    def __init__(self, process: int, seconds: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.process, self.seconds, self.peak, self.ended = process, seconds, 0, threading.Event()

    def run(self) -> None:
        """Read the memory until `end` is called."""
        while not self.ended.wait(self.seconds):
            self.peak = max(self.peak, anonymous(self.process))

    def end(self) -> int:
        """Stop polling, and return the peak."""
        self.ended.set()
        self.join()
        return self.peak


def resident() -> int:
    """Return this process's resident memory in bytes; 0 if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Watched:
    """The record of `probe` about a script: the end of each step, and memory at that time."""

    def __init__(self, script: Path, flags: list[str], folder: Path):
        record, log = folder / "marks.json", folder / "log.txt"
        command = [sys.executable, str(Path(__file__).resolve()), str(record), str(script), *flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
            peak = PeakAnonymous(process.pid)
            peak.start()
            _, status, usage = os.wait4(process.pid, 0)
            self.peak_anonymous = peak.end()
        self.seconds = time.perf_counter() - began
        if status:
            process.returncode = os.waitstatus_to_exitcode(status)
            sys.exit(f"{script} failed:\n{log.read_text()[-2000:]}")
        process.returncode = 0  # already waited for
        marks = json.loads(record.read_text())
        self.ends, self.resident, self.peaks = (list(column) for column in zip(*marks, strict=True))
        self.peak_at_last_step = self.peaks[-1]
        self.peak_of_process = usage.ru_maxrss * 1024

    def durations(self, skip: tuple[int, ...] = ()) -> list[float]:
        """Return the seconds of each step after the warm-up, without steps that follow one in `skip`."""
        pairs = zip(self.ends, self.ends[1:], strict=False)
        return [b - a for step, (a, b) in enumerate(pairs, 1) if step >= WARM_UP and step not in skip]

    @property
    def step(self) -> float:
        """Return the median seconds of a step."""
        return statistics.median(self.durations())

    @property
    def until_first_step(self) -> float:
        """Return the seconds until the first step."""
        return self.ends[0] - self.step

    def figures(self) -> dict:
        """Return seconds and bytes for the results."""
        names = ("step", "until_first_step", "seconds", "peak_at_last_step", "peak_of_process")
        return {name: getattr(self, name) for name in names}


if __name__ == "__main__":
    probe(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
