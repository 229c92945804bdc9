"""What an arm is measured by: losses at fixed timesteps and noises, and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ..arguments import NOISES
from ..output.reports import Reports, Validation
from ..training.best import keep_adapter
from ..training.state import Learner

ADAPTERS = "adapters"  # of every checkpoint that may be chosen, without what a resumed run needs


class SelectLoss(Validation):
    """In place of a run's validation loss: that on the images which choose, and the adapter kept beside it."""

    noises = NOISES

    def _measure_and_draw(self, learner: Learner, reports: Reports, parts: Sequence[str]) -> bool:
        if "loss" in parts and learner.step:
            keep_adapter(learner, adapter_folder(reports.folder, learner.step))
        return super()._measure_and_draw(learner, reports, parts)


def adapter_folder(folder: Path, step: int) -> Path:
    """Where an arm keeps the adapter of a step."""
    return folder / ADAPTERS / f"step-{step:06d}"


# -- memory ------------------------------------------------------------------------------------------------------------


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
