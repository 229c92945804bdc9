"""Stable Diffusion XL: two text encoders, and a U-Net that is conditioned on the size and crop of each image."""

from typing import ClassVar

import torch
from diffusers import StableDiffusionXLPipeline

from .base import ATTENTION, LAYERS, Part
from .unet import WithUNet


class StableDiffusionXL(WithUNet):
    """SDXL, trained as in diffusers' train_text_to_image_lora_sdxl.py (Podell et al., 2023)."""

    name = "sdxl"
    pipeline = StableDiffusionXLPipeline
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    trainable = (Part("text_encoder", reads_last=False), Part("text_encoder_2"))
    unused_parts = ("feature_extractor", "image_encoder")
    encodes_in_float32 = True
    published: ClassVar = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    # Blocks of content and style in B-LoRA (Frenkel et al., 2024)
    layers: ClassVar = LAYERS | {
        name: rf"up_blocks\.0\.attentions\.{number}{LAYERS['attention']}"
        for number, name in enumerate(("content", "style"))
    }
    version = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")
    marks = ("sdxl", "stable-diffusion-xl")
    text_names: ClassVar = {
        "text_encoder": ("lora_te1", "text_encoders.clip_l.transformer"),
        "text_encoder_2": ("lora_te2", "text_encoders.clip_g.transformer"),
    }
    defaults: ClassVar = {
        "resolution": 1024,
        "num_inference_steps": 30,
        "guidance_scale": 5.0,
        "target_modules": [*ATTENTION[:4]],
    }

    def unfit(self, parts):
        """Return a problem if the U-Net is a refiner's, or if it does not fit the text encoders.

        A refiner has five size conditions instead of six, and one text encoder.
        """
        try:
            unet, pooled = parts["unet"], parts["text_encoder_2"]["projection_dim"]
            told = unet["projection_class_embeddings_input_dim"] - pooled
            sizes = told / unet["addition_time_embed_dim"]
            given = sum(parts[name]["hidden_size"] for name in ("text_encoder", "text_encoder_2") if name in parts)
            read = unet["cross_attention_dim"]
        except (KeyError, TypeError):  # older files omit default values
            return None
        if sizes == 5:
            return "its U-Net is a refiner's, which takes five sizes of an image instead of six"
        if sizes != 6:
            return f"its U-Net takes {told} numbers in addition to the pooled states, not the six sizes of an image"
        return None if read == given else f"its U-Net reads text states {read} wide, its text encoders give {given}"

    def encode_trained(self, pipeline, captions, frozen):
        """Return `states` (batch x tokens x width of both encoders) and `pooled` (batch x width of the second)."""
        states, _, pooled, _ = pipeline.encode_prompt(
            captions, device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return the sample, the timestep, the text states, and the pooled states with the sizes as `time_ids`."""
        added = {"text_embeds": conditions.text["pooled"], "time_ids": conditions.sizes.to(noisy.dtype)}
        return {**super().denoiser_inputs(config, noisy, timesteps, conditions), "added_cond_kwargs": added}

    def sampling_inputs(self, pipeline, text, negative, empty):
        """Return states and pooled states of prompt and negative prompt.

        An empty negative prompt becomes zeros if the pipeline's configuration has `force_zeros_for_empty_prompt`.
        """
        if empty and pipeline.config.force_zeros_for_empty_prompt:
            negative = {name: torch.zeros_like(value) for name, value in text.items()}
        return super().sampling_inputs(pipeline, text, negative, empty)

    def kohya_name(self, config, name):
        """Return the name in Stability AI's code or, for deep U-Nets, in diffusers; kohya's scripts read both."""
        # With two-digit numbers, diffusers confuses block 1 with block 10.
        deep = len(config.block_out_channels) * (config.layers_per_block + 1) > 10
        return name if deep else self.original_name(config, name)


FAMILY = StableDiffusionXL()
