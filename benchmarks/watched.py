"""Run a training script in a separate process, and record time and memory after each of its optimizer steps.

`Watched(script, flags, folder)` starts this file as `python watched.py RECORD SCRIPT FLAG ...`. This file imports no
module (such as torch) that the script may need to configure before importing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import itertools
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
        """Record the time since the start, and the peak of resident memory in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        marks.append((time.perf_counter() - began, peak))

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


class Watched:
    """The record of `probe` about a script: its time to the first step, and its memory until the last one."""

    def __init__(self, script: Path, flags: list[str], folder: Path):
        record, log = folder / "marks.json", folder / "log.txt"
        command = [sys.executable, str(Path(__file__).resolve()), str(record), str(script), *flags]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
            peak = PeakAnonymous(process.pid)
            peak.start()
            status = process.wait()
            self.peak_anonymous = peak.end()
        if status:
            sys.exit(f"{script} failed:\n{log.read_text()[-2000:]}")
        ends, peaks = zip(*json.loads(record.read_text()), strict=True)
        step = statistics.median(b - a for a, b in itertools.pairwise(ends[WARM_UP - 1 :]))
        self.until_first_step = ends[0] - step
        self.peak_at_last_step = peaks[-1]


if __name__ == "__main__":
    probe(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
