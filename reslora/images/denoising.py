"""The denoising loss of a batch, for training, validation and calibration."""

import dataclasses
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..linking import unwrap
from ..methods.adapters import without_adapters
from ..tracing import evaluating
from .context import ImageContext
from .data.batch import Batch, stack_texts
from .data.encoding import moments_of
from .model.families.base import Conditions, Text
from .model.loss import loss_of, masked
from .model.objective import Objective


class DenoisingLoss:
    """The denoising loss of a batch: the denoiser's inputs, its prediction, and the loss.

    Images and captions that are not encoded yet are encoded here.
    """

    def __init__(
        self,
        context: ImageContext,
        objective: Objective,
        pipeline: DiffusionPipeline,
        config: dict,
        class_text: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.family, self.objective, self.pipeline = context.model.family, objective, pipeline
        self.config, self.dtype, self.training_options = config, context.dtype, context.options.training
        self.parts = context.live_encoders
        self.loss = loss_of(self.training_options, objective)
        self.class_text = class_text  # frozen text states of --output_preservation_prompt; None without preservation

    def __call__(self, denoiser: nn.Module, batch: Batch, weighted: bool = True) -> torch.Tensor:
        """Return the loss of each sample, of shape (batch,); only trained modules run under autocast.

        `weighted`: whether to return the training loss with its weights. If False, return the unweighted mean squared
        error. Masks apply in both cases.
        """
        batch = self.encoded(batch)
        with torch.autocast(self.pipeline.vae.device.type, enabled=False):
            batch = self._with_moments(batch)
            inputs, target, timesteps = self.inputs(batch)
        prediction = self.family.prediction(denoiser(**inputs, return_dict=False), target).float()
        target = target.float()
        if not weighted:
            return self.squared(prediction, target, batch)
        error = self.loss(prediction, target, timesteps)
        weight = self.objective.weight(timesteps) * batch.weight.to(timesteps.device)
        losses = self._mean(error, batch) * weight
        if self.class_text is None or not torch.is_grad_enabled():  # control methods are calibrated without gradients
            return losses
        return losses + self.training_options.output_preservation_weight * self.preservation(denoiser, batch)

    def preservation(self, denoiser: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean squared error between predictions with and without the adapters, of shape (batch,).

        Both predictions are made from the batch's noisy latents for --output_preservation_prompt, in the denoiser and
        with the text encoders. The prediction without the adapters is the target and has no gradient. This loss is
        ai-toolkit's `diff_output_preservation`, but with one prompt for all samples.
        """
        prediction = self._class_prediction(denoiser, batch)
        models = (unwrap(denoiser), *self.encoders)  # compiling the base model too would take another few minutes
        with torch.no_grad(), evaluating(*models), without_adapters(*models):
            target = self._class_prediction(models[0], batch)
        return (prediction - target).square().flatten(1).mean(1)

    def _class_prediction(self, denoiser: nn.Module, batch: Batch) -> torch.Tensor:
        assert self.class_text is not None
        device = self.pipeline.vae.device
        text: Text = {name: value.unsqueeze(0).to(device) for name, value in self.class_text.items()}
        if self.parts:
            text = self.family.encode_trained(self.pipeline, self.training_options.preserved_prompts, text)
        text = stack_texts([{name: value[0] for name, value in text.items()}] * len(batch.timesteps))
        with torch.autocast(device.type, enabled=False):
            inputs, target, _ = self.inputs(dataclasses.replace(batch, text=text))
        return self.family.prediction(denoiser(**inputs, return_dict=False), target).float()

    def squared(self, prediction: torch.Tensor, target: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean squared error of each sample, of shape (batch,); a mask limits a sample's error to a region.

        `prediction`, `target`: batch x channels x height x width.
        """
        return self._mean((prediction - target).square(), batch)

    def _mean(self, error: torch.Tensor, batch: Batch) -> torch.Tensor:
        return masked(error, batch.mask, self.training_options.masked_loss_normalised).flatten(1).mean(1)

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders that are trained or have new tokens."""
        return [getattr(self.pipeline, part.name) for part in self.parts]

    def encoded(self, batch: Batch) -> Batch:
        """Return the batch with captions encoded by the live text encoders; unchanged if none is trained."""
        if not self.parts:
            return batch
        text = batch.to(self.pipeline.vae.device).text
        if text is None:
            with torch.no_grad(), torch.autocast(self.pipeline.vae.device.type, enabled=False):
                text = self.family.encode_frozen(
                    self.pipeline, list(batch.caption), self.training_options.max_sequence_length
                )
        return dataclasses.replace(batch, text=self.family.encode_trained(self.pipeline, list(batch.caption), text))

    def inputs(self, batch: Batch) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Return the denoiser's keyword arguments for a batch, the target, and the timesteps of shape (batch,).

        The target has the shape of the latents: batch x channels x height x width.
        """
        batch = self._with_moments(batch.to(self.pipeline.vae.device))
        latents = self._latents(batch)
        noisy = self.objective.noisy(latents, batch.noise, batch.timesteps).to(self.dtype)
        text = batch.text
        if text is None:
            longest = self.training_options.max_sequence_length
            with torch.no_grad():
                text = self.family.encode_captions(self.pipeline, list(batch.caption), longest)
        means = () if batch.reference is None else batch.reference.float().unbind(1)
        references = [self.family.scale_latents(self.pipeline.vae, mean).to(self.dtype) for mean in means]
        conditions = Conditions(text, batch.sizes, self.training_options.guidance_scale_train, references)
        inputs = self.family.denoiser_inputs(self.config, noisy, batch.timesteps, conditions)
        return inputs, self.objective.target(latents, batch.noise, batch.timesteps), batch.timesteps

    def _with_moments(self, batch: Batch) -> Batch:
        """Return the batch with encoded images; unchanged if they are encoded already."""
        if batch.moments is not None:
            return batch
        assert batch.pixels is not None
        found: dict = moments_of(self.family, self.pipeline.vae, batch.pixels, batch.reference_pixels)
        return dataclasses.replace(batch, **found)

    def _latents(self, batch: Batch) -> torch.Tensor:
        assert batch.moments is not None
        mean, std = batch.moments.float().unbind(1)
        return self.family.scale_latents(self.pipeline.vae, mean + std * batch.posterior_noise)
