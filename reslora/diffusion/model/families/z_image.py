"""Z-Image: a single stream of text and image tokens, captions of any length, and an output that is negated."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from ....export import COMFYUI_FILE
from .base import FLOW, Family, in_chat


class ZImage(Family):
    """As diffusers' train_dreambooth_lora_z_image.py trains it, but at 1024, and without the refiners."""

    name = "z_image"
    pipeline = ZImagePipeline
    denoiser = "transformer"
    denoiser_class = ZImageTransformer2DModel
    objective = "flow"
    lora_files = (COMFYUI_FILE,)
    unguided = 0.0
    patch = 2
    version = ("z_image", "z-image")
    marks = ("z_image", "zimage", "z-image")
    defaults: ClassVar = {
        **FLOW,
        "resolution": 1024,
        "guidance_scale": 5.0,
        # The refiners before the main layers see text or image alone, and are left as they are.
        "target_modules": [r"layers\.\d+\.attention\.(to_q|to_k|to_v|to_out\.0)"],
    }

    def token_counts(self, pipeline, tokenizer, captions):
        """In the template of a chat."""
        return super().token_counts(pipeline, tokenizer, in_chat(tokenizer, captions, thinking=True))

    def encode_captions(self, pipeline, captions, longest):
        """`states`: a list of (tokens x width), as many tokens as the caption has."""
        device = pipeline.text_encoder.device
        states, _ = pipeline.encode_prompt(
            list(captions), device, do_classifier_free_guidance=False, max_sequence_length=longest
        )
        return {"states": states}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Lists of latents (channels x 1 x height x width) and text states, and `1 - s`."""
        return {
            "x": list(noisy.unsqueeze(2).unbind()),
            "t": (1000 - timesteps) / 1000,
            "cap_feats": list(conditions.text["states"]),
        }

    def prediction(self, output, noisy):
        """The velocity: what the model returns points the other way."""
        return -torch.stack(list(output[0])).squeeze(2)

    def drawing_inputs(self, pipeline, text, negative, empty=True):
        """Lists of text states."""
        states = list(text["states"])
        return {"prompt_embeds": states, "negative_prompt_embeds": [negative["states"][0]] * len(states)}


FAMILY = ZImage()
