"""Write the measurements of this folder, with the machine that they were made on."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reslora.io import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"

QUIET = 0.1  # cores that other processes may use in a valid timing


def machine() -> dict:
    """Return what a timing depends on: processors, threads, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    return {**found, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """Return the processor's name from /proc/cpuinfo, or the architecture on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Others:
    """Measures how many cores other processes, and other virtual machines on the same hardware, use from now on.

    Works on Linux only; on other systems no machine counts as quiet.
    """

    def __init__(self) -> None:
        self.began, self.busy = time.perf_counter(), _busy_elsewhere()

    def __call__(self) -> dict:
        """Return the number of cores, and whether the timing is valid, to store with a measurement."""
        if self.busy is None:
            return {"others": None, "quiet": False}
        cores = max(0.0, (_busy_elsewhere() - self.busy) / (time.perf_counter() - self.began))
        print(f"others kept {cores:.2f} cores busy{'' if cores < QUIET else ': its seconds are no more than an order'}")
        return {"others": round(cores, 3), "quiet": cores < QUIET}


def _busy_elsewhere() -> float | None:
    """Return busy seconds of all processors since boot, without those of this process and its finished children."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = ticks
    busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def check_names(parser: argparse.ArgumentParser, names: Iterable[str], known: Collection[str]) -> None:
    """Exit with an error if one of `names` is unknown."""
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown experiment {unknown[0]}; choose from {', '.join(known)}")


def keep(name: str, figures: dict) -> None:
    """Write `figures` and the machine to benchmarks/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": machine(), **figures})
    print(f"kept in {path}", flush=True)
