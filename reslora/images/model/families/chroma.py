"""Chroma: Flux.1 schnell without CLIP and with an approximator of all modulations; T5's padding is masked."""

from typing import ClassVar

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel

from .base import Family
from .flux import ORIGINAL, Flux
from .qwen_autoencoder import padded_inputs, prompt_inputs, without_padding

APPROXIMATED = ("time_text_embed", "norm")


class Chroma(Flux):
    """Chroma, trained on the layers of diffusers' train_dreambooth_lora_flux.py; diffusers has no script for it.

    The denoiser reads the tokens of a caption and one token of padding. diffusers' pipeline passes the mask of the
    other padding as floating point, which attention adds to its logits instead of masking. In this family, as in the
    model's original code, padding has no effect. States are not padded at all; this is equivalent, because text has no
    positions.
    """

    name = "chroma"
    pipeline = ChromaPipeline
    denoiser_class = ChromaTransformer2DModel
    text_parts = ("text_encoder", "tokenizer")
    trainable = ()
    takes_guidance = False
    original: ClassVar = {
        ours: theirs
        for ours, theirs in ORIGINAL.items()
        if not any(part.startswith(APPROXIMATED) for part in ours.split("."))
    } | {
        "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.layers.{}.linear_1": "distilled_guidance_layer.layers.{}.in_layer",
        "distilled_guidance_layer.layers.{}.linear_2": "distilled_guidance_layer.layers.{}.out_layer",
        "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
    }
    published: ClassVar = {}
    derived = True
    version = ("chroma", "chroma")
    model_version = Family.model_version  # one model, unlike Flux.1
    marks = ("chroma",)
    text_names: ClassVar = {}
    defaults: ClassVar = {**Flux.defaults, "guidance_scale": 5.0, "num_inference_steps": 35}

    def encode_captions(self, pipeline, captions, longest):
        """Return `states`: a list of (tokens x width), with the caption's tokens and at most one token of padding."""
        device = pipeline.text_encoder.device
        states, mask = pipeline._get_t5_prompt_embeds(captions, max_sequence_length=longest, device=device)
        return {"states": without_padding(states, mask)}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return packed latents, timesteps in [0, 1], text states, position ids, and the mask of text and image.

        The mask is None if nothing is padded.
        """
        batch, _, height, width = noisy.shape
        states, mask = padded_inputs(conditions.text["states"])
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch, height * width // self.latents_per_token)], dim=1)
        return self.packed_inputs(noisy, timesteps, states) | {"attention_mask": mask}

    def sampling_inputs(self, pipeline, text, negative, empty):
        """Return text states of the captions and of the negative prompt, with boolean masks.

        Attention would add floating-point masks to its logits instead.
        """
        return prompt_inputs(text, negative, mask="prompt_attention_mask")


FAMILY = Chroma()
