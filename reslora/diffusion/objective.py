"""What the denoiser should predict, and how its error counts: a class an objective, functions of tensors."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, SchedulerMixin


class DdpmObjective:
    """Denoising diffusion (Ho et al., 2020): the noise, or v (Salimans and Ho, 2022), at a timestep drawn evenly.

    Raises `ValueError` for a scheduler whose prediction type is neither.
    """

    def __init__(self, scheduler: SchedulerMixin, snr_gamma: float | None = None) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.snr_gamma = snr_gamma
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r}: only epsilon and v_prediction can be trained")

    @property
    def timesteps(self) -> int:
        """How many timesteps there are."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """A timestep for a training sample."""
        return torch.randint(self.timesteps, (), generator=generator)

    def at(self, fraction: float) -> torch.Tensor:
        """The timestep at a fraction of the way from the first to the last."""
        return torch.tensor(min(self.timesteps - 1, int(fraction * self.timesteps)))

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`sqrt(a_t) x + sqrt(1 - a_t) e`, batch first."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noise e, or `v = sqrt(a_t) e - sqrt(1 - a_t) x`."""
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of each loss: 1, or min-SNR (Hang et al., 2023): `min(SNR, gamma) / SNR`, for v over SNR + 1."""
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas / (1 - alphas)
        return torch.clamp(snr, max=self.snr_gamma) / (snr + 1 if self.prediction_type == "v_prediction" else snr)


OBJECTIVES = {"ddpm": DdpmObjective}


def loss_per_sample(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error of each sample of a batch."""
    error = (prediction - target).square()
    return error.flatten(1).mean(dim=1) * weight
