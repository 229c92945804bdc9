"""FLUX.2 dev and klein as edit models: the tokens of the reference images follow those of the image."""

import math

import torch

from .flux2 import Flux2
from .flux2_klein import Flux2Klein

AREA, LEAST = 1024 * 1024, 64  # the most pixels of a reference image, and its shortest side, in the pipeline
MULTIPLE = 16  # height and width are multiples of this number of pixels
APART = 10  # the first coordinate of the position ids of the first reference image, 20 for the second, and so on


class Flux2KleinEdit(Flux2Klein):
    """FLUX.2 klein, trained on pairs of images as in diffusers' train_dreambooth_lora_flux2_klein_img2img.py.

    As in the pipeline, the latents of the reference images are the mean, not a sample.
    """

    edits = True
    batches_references = False
    most_references = None
    editing: str | None = None

    def reference_size(self, height, width):
        """Return the size of the image, or one that the pipeline accepts if the image is larger or smaller."""
        scale = max(min(1.0, math.sqrt(AREA / (height * width))), LEAST / min(height, width))
        if scale == 1:
            return height, width
        height, width = (max(LEAST, int(side * scale) // MULTIPLE * MULTIPLE) for side in (height, width))
        return height, width

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return FLUX.2's inputs; the references' tokens follow, with multiples of APART as the first coordinate."""
        inputs = super().denoiser_inputs(config, noisy, timesteps, conditions)
        tokens, places = [inputs["hidden_states"]], [inputs["img_ids"]]
        for number, reference in enumerate(conditions.references, 1):
            ids = self.pipeline._prepare_latent_ids(reference).to(noisy.device, copy=True)
            ids[..., 0] = APART * number
            tokens.append(self.pipeline._pack_latents(reference))
            places.append(ids)
        return inputs | {"hidden_states": torch.cat(tokens, 1), "img_ids": torch.cat(places, 1)}

    def reference_inputs(self, references):
        """Return the images of a single sample: the pipeline would use all given images for every sample."""
        return {"image": references[0]}


class Flux2Edit(Flux2KleinEdit, Flux2):
    """FLUX.2 dev, trained on pairs of images as klein is."""
