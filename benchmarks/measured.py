"""Where the measurements of this folder are kept, and on which machine they were made."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reslora.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict:
    """What a time depends on: processors, threads, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    return {**found, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """The processor's name as Linux gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def keep(name: str, figures: dict) -> None:
    """Writes `figures`, and the machine they belong to, to benchmarks/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": machine(), **figures})
    print(f"kept in {path}", flush=True)
