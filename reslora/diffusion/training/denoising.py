"""A batch of samples, noised, through the denoiser: the loss of training, validation and calibration."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..context import Context
from ..data.batch import Batch
from ..model.families.base import Conditions, Text
from ..model.loading import wide_enough
from ..model.objective import Objective, loss_per_sample


class DenoisingLoss:
    """Makes the denoiser's inputs and targets of a batch; images and captions that are not encoded yet are here."""

    def __init__(self, context: Context, objective: Objective, pipeline: DiffusionPipeline, config: dict) -> None:
        self.family, self.objective, self.pipeline = context.model.family, objective, pipeline
        self.config, self.dtype, self.flags = config, context.dtype, context.flags

    def __call__(self, denoiser: nn.Module, batch: Batch, weighted: bool = True) -> torch.Tensor:
        """Loss of each sample of a batch; the denoiser alone computes in the precision of autocast."""
        with torch.autocast(self.pipeline.vae.device.type, enabled=False):
            inputs, target, timesteps = self.inputs(batch)
        prediction = self.family.prediction(denoiser(**inputs, return_dict=False), target).float()
        weight = torch.ones_like(timesteps, dtype=torch.float32)
        if weighted:
            weight = self.objective.weight(timesteps) * batch.weight.to(timesteps.device)
        return loss_per_sample(prediction, target.float(), weight)

    def inputs(self, batch: Batch) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """The denoiser's keyword arguments for a batch, what it should predict, and the timesteps."""
        batch = batch.to(self.pipeline.vae.device)
        latents = self._latents(batch)
        noisy = self.objective.noisy(latents, batch.noise, batch.timesteps).to(self.dtype)
        conditions = Conditions(self._text(batch), batch.sizes, self.flags.guidance_scale_train)
        inputs = self.family.denoiser_inputs(self.config, noisy, batch.timesteps, conditions)
        return inputs, self.objective.target(latents, batch.noise, batch.timesteps), batch.timesteps

    def _latents(self, batch: Batch) -> torch.Tensor:
        vae, moments = self.pipeline.vae, batch.moments
        if moments is None:
            assert batch.pixels is not None
            with torch.no_grad(), wide_enough(self.family, vae):
                moments = self.family.encode_images(vae, batch.pixels.to(vae.dtype))
        mean, std = moments.float().unbind(1)
        return self.family.scale_latents(vae, mean + std * batch.posterior_noise)

    def _text(self, batch: Batch) -> Text:
        if batch.text is None:
            with torch.no_grad():
                return self.family.encode_captions(self.pipeline, batch.caption, self.flags.max_sequence_length)
        return batch.text
