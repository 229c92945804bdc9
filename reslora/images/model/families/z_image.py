"""Z-Image: a single stream of text and image tokens, captions of any length, and a negated output."""

from typing import ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from ....export import COMFYUI_FILE
from .base import FLOW, Family


class ZImage(Family):
    """Z-Image, trained as in diffusers' train_dreambooth_lora_z_image.py, but at 1024 pixels, without the refiners."""

    name = "z_image"
    pipeline = ZImagePipeline
    denoiser_class = ZImageTransformer2DModel
    lora_files = (COMFYUI_FILE,)
    unguided = 0.0
    thinking = True
    patch = 2
    version = ("z_image", "z-image")
    # The refiners before the main layers get no adapter, because each of them reads only text or only the image.
    layers: ClassVar = {
        "attention": r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)",
        "mlp": r"layers\.\d+\.feed_forward\.w[123]",
    }
    marks = ("z_image", "zimage", "z-image")
    defaults: ClassVar = {
        **FLOW,
        "resolution": 1024,
        "guidance_scale": 5.0,
        "target_modules": [layers["attention"]],
    }

    def encode_captions(self, pipeline, captions, longest):
        """Return `states`: a list of (tokens x width), with the caption's tokens."""
        states, _ = pipeline.encode_prompt(
            captions, pipeline.text_encoder.device, do_classifier_free_guidance=False, max_sequence_length=longest
        )
        return {"states": states}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return lists of latents (channels x 1 x height x width) and of text states, and `1 - timesteps / 1000`."""
        return {
            "x": list(noisy.unsqueeze(2).unbind()),
            "t": (1000 - timesteps) / 1000,
            "cap_feats": list(conditions.text["states"]),
        }

    def prediction(self, output, noisy):
        """Return the velocity, which is the negated output."""
        return -torch.stack(list(output[0])).squeeze(2)

    def sampling_inputs(self, pipeline, text, negative, empty):
        """Return lists of text states of the captions and of the negative prompt."""
        states = list(text["states"])
        return {"prompt_embeds": states, "negative_prompt_embeds": [negative["states"][0]] * len(states)}


FAMILY = ZImage()
