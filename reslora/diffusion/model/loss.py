"""How the error of a prediction counts: its square or a Huber loss, in the whole image or within a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from ...options.images import TrainingOptions
from .objective import Objective


@dataclass(frozen=True)
class Huber:
    """The pseudo-Huber loss with a threshold c that may depend on the timestep, as in kohya's scripts.

    `huber`: `2 c (sqrt(d^2 + c^2) - c)`, which is `d^2` for small d. `smooth_l1`: without the factor c, which is
    `2 |d|` for large d. `schedule`: `constant`, c; `exponential`, `c^(t/T)`, from 1 without noise to c in pure noise;
    `snr`, `(1 - c) / (1 + SNR^(-1/2))^2 + c`, which is about the same for each way to add noise. All but the last are
    multiplied by `scale`.
    """

    objective: Objective
    kind: str = "huber"
    schedule: str = "snr"
    c: float = 0.1
    scale: float = 1.0

    def threshold(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The threshold of each sample."""
        if self.schedule == "snr":
            return (1 - self.c) * self.objective.share_of_image(timesteps).square() + self.c
        if self.schedule == "exponential":
            return self.scale * self.c ** (timesteps / self.objective.timesteps)
        return torch.full(timesteps.shape, self.scale * self.c, device=timesteps.device)

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The loss of each number of the prediction (batch first)."""
        c = self.threshold(timesteps).to(prediction.dtype).view(-1, *[1] * (prediction.dim() - 1))
        square = (prediction - target).square()
        loss = 2 * square / ((square + c.square()).sqrt() + c)  # where d is far below c, a difference would be rounding
        return c * loss if self.kind == "huber" else loss


def huber_of(options: TrainingOptions, objective: Objective) -> Huber | None:
    """The loss that the options name; None for the square."""
    if options.loss_type == "l2":
        return None
    return Huber(objective, options.loss_type, options.huber_schedule, options.huber_c, options.huber_scale)


def squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The square of each difference."""
    return (prediction - target).square()


def loss_per_sample(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of each sample's errors, batch first."""
    return error.flatten(1).mean(dim=1) * weight


def masked(error: torch.Tensor, mask: torch.Tensor | None, normalised: bool = False) -> torch.Tensor:
    """Errors (batch x channels x height x width), each times how much its place counts; where that is 0, no gradient.

    `mask`: batch x 1 x height x width, in [0, 1], of any size; its mean over the area of a place is what counts.
    `normalised`: the mean of a sample's errors is that over what counts, and not lower the less does.
    """
    if mask is None:
        return error
    mask = interpolate(mask, error.shape[-2:], mode="area")
    share = mask.flatten(1).mean(1).view(-1, 1, 1, 1)
    return error * (mask / share.clamp(min=torch.finfo(mask.dtype).tiny) if normalised else mask)
