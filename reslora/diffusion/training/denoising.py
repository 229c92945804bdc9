"""A batch of samples, noised, through the denoiser: the loss of training, validation and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..arguments import Flags
from ..model.families.base import Conditions, Family, Text
from .objective import Objective, loss_per_sample


class DenoisingLoss:
    """Makes the denoiser's inputs and targets of a batch; images and captions that are not encoded yet are here."""

    def __init__(
        self,
        family: Family,
        objective: Objective,
        pipeline: DiffusionPipeline,
        config: dict,
        dtype: torch.dtype,
        flags: Flags,
    ) -> None:
        self.family, self.objective, self.pipeline = family, objective, pipeline
        self.config, self.dtype, self.flags = config, dtype, flags

    def __call__(self, denoiser: nn.Module, batch: dict, weighted: bool = True) -> torch.Tensor:
        """Loss of each sample of a batch."""
        inputs, target, timesteps = self.inputs(batch)
        prediction = self.family.prediction(denoiser(**inputs, return_dict=False), target).float()
        weight = self.objective.weight(timesteps) if weighted else torch.ones_like(timesteps, dtype=torch.float32)
        return loss_per_sample(prediction, target.float(), weight)

    def inputs(self, batch: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """The denoiser's keyword arguments for a batch, what it should predict, and the timesteps."""
        device = self.pipeline.vae.device
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        timesteps, noise = tensors["timesteps"], tensors["noise"]
        latents = self._latents(tensors)
        noisy = self.objective.noisy(latents, noise, timesteps).to(self.dtype)
        conditions = Conditions(self._text(batch, device), tensors["sizes"], self.flags.guidance_scale_train)
        inputs = self.family.denoiser_inputs(self.config, noisy, timesteps, conditions)
        return inputs, self.objective.target(latents, noise, timesteps), timesteps

    def _latents(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        vae = self.pipeline.vae
        moments = tensors.get("moments")
        if moments is None:
            with torch.no_grad(), wide_enough(self.family, vae):
                moments = self.family.encode_images(vae, tensors["pixels"].to(vae.dtype))
        mean, std = moments.float().unbind(1)
        return self.family.scale_latents(vae, mean + std * tensors["posterior_noise"])

    def _text(self, batch: dict, device: torch.device) -> Text:
        if "text" not in batch:
            with torch.no_grad():
                return self.family.encode_captions(self.pipeline, batch["caption"], self.flags.max_sequence_length)
        return on_device(batch["text"], device)


def on_device(text: dict, device: torch.device, dtype: torch.dtype | None = None) -> Text:
    """Text states on a device, and in `dtype` where one is given."""

    def moved(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        return list(map(moved, value)) if isinstance(value, list) else value.to(device, dtype, non_blocking=True)

    return {name: moved(value) for name, value in text.items()}


@contextmanager
def wide_enough(family: Family, vae: nn.Module) -> Iterator[None]:
    """Runs its body with the autoencoder in float32 where it would overflow in half precision."""
    if not (family.encodes_in_float32 and vae.config.force_upcast and vae.dtype == torch.float16):
        yield
        return
    try:
        yield vae.to(torch.float32)
    finally:
        vae.to(torch.float16)
