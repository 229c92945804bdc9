"""Flux.1 dev and schnell: packed latents with position ids, two kinds of blocks, and distilled guidance (dev)."""

from typing import ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from .base import ATTENTION, FLOW, LAYERS, Family, Part

ORIGINAL = {
    **{f"transformer_blocks.{{}}.attn.{name}": "double_blocks.{}.img_attn.qkv" for name in ATTENTION[:3]},
    **{f"transformer_blocks.{{}}.attn.{name}": "double_blocks.{}.txt_attn.qkv" for name in ATTENTION[4:7]},
    "transformer_blocks.{}.attn.to_out.0": "double_blocks.{}.img_attn.proj",
    "transformer_blocks.{}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
    "transformer_blocks.{}.ff.net.0.proj": "double_blocks.{}.img_mlp.0",
    "transformer_blocks.{}.ff.net.2": "double_blocks.{}.img_mlp.2",
    "transformer_blocks.{}.ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0",
    "transformer_blocks.{}.ff_context.net.2": "double_blocks.{}.txt_mlp.2",
    "transformer_blocks.{}.norm1.linear": "double_blocks.{}.img_mod.lin",
    "transformer_blocks.{}.norm1_context.linear": "double_blocks.{}.txt_mod.lin",
    **{f"single_transformer_blocks.{{}}.attn.{name}": "single_blocks.{}.linear1" for name in ATTENTION[:3]},
    "single_transformer_blocks.{}.proj_mlp": "single_blocks.{}.linear1",
    "single_transformer_blocks.{}.proj_out": "single_blocks.{}.linear2",
    "single_transformer_blocks.{}.norm.linear": "single_blocks.{}.modulation.lin",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class Flux(Family):
    """Flux.1, trained as in diffusers' train_dreambooth_lora_flux.py, but with a guidance input of 1, not 3.5."""

    name = "flux"
    pipeline = FluxPipeline
    denoiser_class = FluxTransformer2DModel
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    trainable: tuple[Part, ...] = (Part("text_encoder"),)
    unused_parts = ("image_encoder", "feature_extractor")
    lora_files = ()
    takes_guidance = True
    patch = 2
    layers: ClassVar = LAYERS | {"mlp": rf"{LAYERS['mlp']}|single_transformer_blocks\.\d+\.proj_(mlp|out)"}
    original = ORIGINAL
    published: ClassVar = {"guidance_embeds": True}
    marks: tuple[str, ...] = ("flux1", "flux-1")
    comfyui_words = ("lora_down", "lora_up")
    text_names: ClassVar = {
        "text_encoder": ("lora_te1", "text_encoders.clip_l.transformer"),
        "text_encoder_2": ("lora_te3", "text_encoders.t5xxl.transformer"),
    }
    defaults: ClassVar = {
        **FLOW,
        "guidance_scale": 3.5,
        "target_modules": [*(f"attn.{name}" for name in ATTENTION), *FEED_FORWARD],
    }

    def encode_frozen(self, pipeline, captions, longest):
        """Return the hidden states of T5 by the name `states` (batch x tokens x width)."""
        device = pipeline.text_encoder_2.device
        return {"states": pipeline._get_t5_prompt_embeds(captions, max_sequence_length=longest, device=device)}

    def encode_trained(self, pipeline, captions, frozen):
        """Return `states` from `frozen`, and CLIP's pooled output as `pooled` (batch x width)."""
        pooled = pipeline._get_clip_prompt_embeds(captions, device=pipeline.text_encoder.device)
        return {"states": frozen["states"], "pooled": pooled}

    def packed_inputs(self, noisy, timesteps, states, **more):
        """Return packed latents, timesteps in [0, 1], `more`, text states, and position ids of text and image."""
        batch, _, height, width = noisy.shape
        where = {"device": noisy.device, "dtype": noisy.dtype}
        return {
            "hidden_states": self.pipeline._pack_latents(noisy, *noisy.shape),
            "timestep": timesteps / 1000,
            **more,
            "encoder_hidden_states": states,
            "txt_ids": torch.zeros(states.shape[1], 3, **where),
            "img_ids": self.pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **where),
        }

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return packed latents, timesteps in [0, 1], text states, pooled states, position ids, and the guidance."""
        text, guidance = conditions.text, None
        if config.guidance_embeds:
            guidance = torch.full((len(noisy),), conditions.guidance, device=noisy.device)
        more = {"guidance": guidance, "pooled_projections": text["pooled"]}
        return self.packed_inputs(noisy, timesteps, text["states"], **more)

    def prediction(self, output, noisy):
        """Return the unpacked velocity."""
        return self.pipeline._unpack_latents(self.own_tokens(output, noisy), *noisy.shape[2:], vae_scale_factor=1)

    def model_version(self, config, predicts_v):
        """Return the two names of Flux.1 dev, or of schnell if the denoiser has no guidance embedding."""
        return "flux1", "flux-1-dev" if config.guidance_embeds else "flux-1-schnell"


FAMILY = Flux()
