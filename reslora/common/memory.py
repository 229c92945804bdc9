"""How much memory a run takes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil
import torch


def forget_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts; on a CPU where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the most: allocated on a GPU; on a CPU resident, what the process had before included; else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError, ValueError):
        if device.type == "cpu":
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process may still take: of a GPU; on a CPU its share of what the system has; else None."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return None
