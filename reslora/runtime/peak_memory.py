"""Measure the peak memory of a run, and the memory that is free."""

import contextlib
import os
from pathlib import Path

import psutil
import torch


def forget_peak(device: torch.device) -> None:
    """Reset the peak that `peak_memory` returns; for a CPU device, this works only on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # only Linux has it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes, allocated (GPU) or resident (CPU); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError, ValueError):
        if device.type == "cpu":
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return None


def free_memory(device: torch.device) -> int | None:
    """Return the free memory in bytes (CPU: divided by the number of processes of this machine); None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return None
