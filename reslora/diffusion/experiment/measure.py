"""What an arm is measured by: losses at fixed timesteps and noises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
