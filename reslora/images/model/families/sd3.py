"""Stable Diffusion 3 and 3.5: three text encoders, joint attention of text and image."""

from typing import ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from .base import ATTENTION, Family, Part

ORIGINAL = {
    **{f"transformer_blocks.{{}}.attn.{name}": "joint_blocks.{}.x_block.attn.qkv" for name in ATTENTION[:3]},
    **{f"transformer_blocks.{{}}.attn.{name}": "joint_blocks.{}.context_block.attn.qkv" for name in ATTENTION[4:7]},
    **{f"transformer_blocks.{{}}.attn2.{name}": "joint_blocks.{}.x_block.attn2.qkv" for name in ATTENTION[:3]},
    "transformer_blocks.{}.attn.to_out.0": "joint_blocks.{}.x_block.attn.proj",
    "transformer_blocks.{}.attn.to_add_out": "joint_blocks.{}.context_block.attn.proj",
    "transformer_blocks.{}.attn2.to_out.0": "joint_blocks.{}.x_block.attn2.proj",
    "transformer_blocks.{}.ff.net.0.proj": "joint_blocks.{}.x_block.mlp.fc1",
    "transformer_blocks.{}.ff.net.2": "joint_blocks.{}.x_block.mlp.fc2",
    "transformer_blocks.{}.ff_context.net.0.proj": "joint_blocks.{}.context_block.mlp.fc1",
    "transformer_blocks.{}.ff_context.net.2": "joint_blocks.{}.context_block.mlp.fc2",
    "transformer_blocks.{}.norm1.linear": "joint_blocks.{}.x_block.adaLN_modulation.1",
    "transformer_blocks.{}.norm1_context.linear": "joint_blocks.{}.context_block.adaLN_modulation.1",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


class StableDiffusion3(Family):
    """SD3, trained as in diffusers' train_dreambooth_lora_sd3.py, but at 1024 px and without preconditioned outputs."""

    name = "sd3"
    pipeline = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    trainable = (Part("text_encoder"), Part("text_encoder_2"))
    unused_parts = ("image_encoder", "feature_extractor")
    lora_files = ()
    original = ORIGINAL
    published: ClassVar = {"num_layers": 38, "dual_attention_layers": tuple(range(38))}
    largest: ClassVar = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}  # 3.5 large
    marks = ("sd3", "stable-diffusion-3")
    text_names: ClassVar = {
        "text_encoder": ("lora_te1", "text_encoders.clip_l.transformer"),
        "text_encoder_2": ("lora_te2", "text_encoders.clip_g.transformer"),
        "text_encoder_3": ("lora_te3", "text_encoders.t5xxl.transformer"),
    }
    defaults: ClassVar = {
        "resolution": 1024,
        "num_inference_steps": 28,
        "guidance_scale": 7.0,
        "weighting_scheme": "logit_normal",
        "max_sequence_length": 77,
        "target_modules": [f"attn.{name}" for name in ATTENTION],
    }

    def pixel_multiple(self, pipeline):
        """Return the multiple for image height and width in pixels: the autoencoder's factor times the patch size."""
        return pipeline.vae_scale_factor * pipeline.patch_size

    def encode_frozen(self, pipeline, captions, longest):
        """Return `t5`: T5's states, or zeros if the pipeline lacks T5."""
        device = pipeline.text_encoder.device
        return {"t5": pipeline._get_t5_prompt_embeds(captions, max_sequence_length=longest, device=device)}

    def encode_trained(self, pipeline, captions, frozen):
        """Return `states` (batch x tokens x width) and `pooled` of both CLIPs (batch x width).

        The states are the states of both CLIPs, concatenated and zero-padded to T5's width, followed by T5's tokens.
        """
        device, t5 = pipeline.text_encoder.device, frozen["t5"]
        clips = [
            pipeline._get_clip_prompt_embeds(captions, device=device, clip_model_index=number)
            for number in range(len(self.trainable))
        ]
        clip, pooled = (torch.cat(found, dim=-1) for found in zip(*clips, strict=True))
        clip = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"states": torch.cat([clip, t5], dim=-2), "pooled": pooled}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return the latents, the timestep, text states and pooled states."""
        return {
            "hidden_states": noisy,
            "timestep": timesteps,
            "encoder_hidden_states": conditions.text["states"],
            "pooled_projections": conditions.text["pooled"],
        }

    def model_version(self, config, predicts_v):
        """Return the two names of Stable Diffusion 3 or 3.5 in the model's size.

        3 medium has 24 blocks, 3.5 large has 38, and 3.5 medium has dual attention in some blocks.
        """
        if config.dual_attention_layers:
            return "sd3.5_medium", "stable-diffusion-3.5-medium"
        large = config.num_layers >= 38
        return ("sd3.5_large", "stable-diffusion-3.5-large") if large else ("sd3_m", "stable-diffusion-3-medium")


FAMILY = StableDiffusion3()
