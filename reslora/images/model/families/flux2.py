"""FLUX.2 dev: FLUX.2 klein with distilled guidance, and Mistral Small as text encoder."""

from typing import ClassVar

import torch
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input

from .base import Family
from .flux2_klein import ORIGINAL, Flux2Klein


class Flux2(Flux2Klein):
    """FLUX.2 dev, trained as in diffusers' train_dreambooth_lora_flux2.py, with the differences of Flux.1 and klein.

    The guidance input is 1, not 3.5, and the attention layers for the text are adapted too.
    """

    name = "flux2"
    editing: str | None = "flux2_edit.Flux2Edit"
    pipeline = Flux2Pipeline
    takes_guidance = True
    thinking = None
    original: ClassVar = ORIGINAL | {
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    }
    published: ClassVar = {"guidance_embeds": True}
    one_size = True
    version = ("flux2_dev", "flux-2-dev")
    model_version = Family.model_version  # one size, unlike klein
    marks = version

    def token_counts(self, pipeline, tokenizer, captions):
        """Return the number of tokens of each caption in the chat template, including the system message."""
        messages = format_input(captions, pipeline.system_message)
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, padding=True)
        return found["attention_mask"].sum(dim=1).tolist()

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return klein's inputs and, if the denoiser embeds it, the guidance."""
        inputs = super().denoiser_inputs(config, noisy, timesteps, conditions)
        if config.guidance_embeds:
            inputs["guidance"] = torch.full((len(noisy),), conditions.guidance, device=noisy.device)
        return inputs


FAMILY = Flux2()
