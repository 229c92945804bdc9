"""The loss of a prediction: squared error or pseudo-Huber, over the complete image or under a mask."""

from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate

from ...options.images import TrainingOptions
from .objective import Objective


@dataclass(frozen=True)
class Huber:
    """The pseudo-Huber loss of a difference d, as in kohya's scripts; its threshold may depend on the timestep.

    With the threshold h, the loss is, by `kind`,

    - `huber`: `2 h (sqrt(d^2 + h^2) - h)`, about `d^2` for small d;
    - `smooth_l1`: `2 (sqrt(d^2 + h^2) - h)`, about `2 |d|` for large d.

    At timestep t of T, the threshold h is, by `schedule`,

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
        c = self.threshold(timesteps).to(prediction.dtype).view(-1, *[1] * (prediction.dim() - 1))
        square = (prediction - target).square()
        loss = 2 * square / ((square + c.square()).sqrt() + c)  # numerically stable for d far below c
        return c * loss if self.kind == "huber" else loss


def huber_of(options: TrainingOptions, objective: Objective) -> Huber | None:
    """Return the Huber loss that the options specify, or None for the squared error."""
    if options.loss_type == "l2":
        return None
    return Huber(objective, options.loss_type, options.huber_schedule, options.huber_c, options.huber_scale)


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
