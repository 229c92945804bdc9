"""What an arm is measured by: losses at fixed timesteps and noises."""

from __future__ import annotations

import torch

from ...experiment.course import adapter_folder
from ...options.images import NOISES
from ..output.reports import Reports, Validation
from ..training.best import keep_adapter
from ..training.state import Learner


class SelectLoss(Validation):
    """In place of a run's validation loss: that on the images which choose, and the adapter kept beside it."""

    noises = NOISES

    def _keep_losses(self, learner: Learner, reports: Reports, losses: torch.Tensor) -> None:
        if learner.step:
            keep_adapter(learner, adapter_folder(reports.folder, learner.step))
        super()._keep_losses(learner, reports, losses)
