"""Flux.1 Kontext: Flux.1, with the tokens of a reference image after those of the image."""

import math

import torch
from diffusers import FluxKontextPipeline

from .flux import Flux


class FluxKontext(Flux):
    """Flux.1 Kontext, trained as in diffusers' train_dreambooth_lora_flux_kontext.py.

    As in the pipeline, the latents of the reference image are the mean, not a sample.
    """

    name = "flux_kontext"
    pipeline = FluxKontextPipeline
    edits = True

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return Flux's inputs; the reference's tokens follow those of the image, with 1 as the first coordinate of
        their position ids.
        """
        inputs = super().denoiser_inputs(config, noisy, timesteps, conditions)
        (reference,) = conditions.references
        both = torch.cat([inputs["hidden_states"], self.pipeline._pack_latents(reference, *noisy.shape)], 1)
        ids = inputs["img_ids"]
        reference_ids = torch.cat([torch.ones_like(ids[:, :1]), ids[:, 1:]], 1)
        return inputs | {"hidden_states": both, "img_ids": torch.cat([ids, reference_ids])}

    def reference_inputs(self, references):
        """Return the images, and arguments with which the pipeline scales neither them nor the samples."""
        images = [image for (image,) in references]
        return {"image": images, "max_area": math.prod(images[0].size), "_auto_resize": False}


FAMILY = FluxKontext()
