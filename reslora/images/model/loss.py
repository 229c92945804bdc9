"""The loss of a prediction, over the complete image or under a mask."""

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from ...losses import LOSSES
from ...options.images import TrainingOptions
from .objective import Objective


@dataclass(frozen=True)
class PredictionLoss:
    """The loss `kind` of `LOSSES`; its threshold may depend on the timestep, as in kohya's scripts.

    At timestep t of T, the threshold is, by `schedule`,

    - `constant`: `scale * c`;
    - `exponential`: `scale * c^(t/T)`, where `c^(t/T)` goes from 1 without noise to c in pure noise;
    - `snr`: `(1 - c) / (1 + SNR^(-1/2))^2 + c`, which is about the same for DDPM and flow models.
    """

    objective: Objective
    kind: str = "huber"
    schedule: str = "snr"
    c: float = 0.1
    scale: float = 1.0

    def threshold(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the threshold of each sample, of shape (batch,), at its timestep."""
        if self.schedule == "snr":
            return (1 - self.c) * self.objective.share_of_image(timesteps).square() + self.c
        if self.schedule == "exponential":
            return self.scale * self.c ** (timesteps / self.objective.timesteps)
        return torch.full(timesteps.shape, self.scale * self.c, device=timesteps.device)

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the loss of each element, in the shape of `prediction`, batch first.

        `timesteps` has shape (batch,).
        """
        threshold = self.threshold(timesteps).to(prediction.dtype).view(-1, *[1] * (prediction.dim() - 1))
        return LOSSES[self.kind].formula(prediction - target, threshold)


def loss_of(options: TrainingOptions, objective: Objective) -> PredictionLoss:
    """Return the loss that the options specify."""
    return PredictionLoss(objective, options.loss_type, options.huber_schedule, options.huber_c, options.huber_scale)


def masked(error: torch.Tensor, mask: torch.Tensor | None, normalised: bool = False) -> torch.Tensor:
    """Return errors (batch x channels x height x width) multiplied by the mask; a mask of 0 stops the gradient.

    `mask` is batch x 1 x height x width in [0, 1] at any resolution, and is averaged down to that of the errors.
    `normalised` divides by the mask's mean, so that the loss does not depend on the masked fraction.
    """
    if mask is None:
        return error
    mask = interpolate(mask.to(error.device), error.shape[-2:], mode="area")
    share = mask.flatten(1).mean(1).view(-1, 1, 1, 1)
    return error * (mask / share.clamp(min=torch.finfo(mask.dtype).tiny) if normalised else mask)
