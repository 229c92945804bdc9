"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, and a U-Net that predicts epsilon or v."""

from typing import ClassVar

from diffusers import StableDiffusionPipeline

from .base import ATTENTION, Part
from .unet import WithUNet


class StableDiffusion(WithUNet):
    """Stable Diffusion, trained as in diffusers' train_text_to_image_lora.py."""

    name = "stable_diffusion"
    pipeline = StableDiffusionPipeline
    trainable = (Part("text_encoder"),)
    unused_parts = ("safety_checker", "feature_extractor", "image_encoder")
    published: ClassVar = {"cross_attention_dim": 768}
    marks = ("sd_v1", "sd_v2", "stable-diffusion-v1", "stable-diffusion-v2")
    text_names: ClassVar = {"text_encoder": ("lora_te", "text_encoders.clip_l.transformer")}
    defaults: ClassVar = {
        "resolution": 512,
        "num_inference_steps": 30,
        "guidance_scale": 7.5,
        "target_modules": [*ATTENTION[:4]],
    }

    def encode_trained(self, pipeline, captions, frozen):
        """Return `states` (batch x tokens x width)."""
        states, _ = pipeline.encode_prompt(captions, pipeline.text_encoder.device, 1, False)
        return {"states": states}

    def kohya_name(self, config, name):
        """Return the name in diffusers: unlike for SDXL, kohya's scripts train diffusers' U-Net."""
        return name

    def model_version(self, config, predicts_v):
        """Return the names by the width of the text states (768 in 1.x, 1024 in 2.x), and by the prediction type."""
        version, mark = 2 if config.cross_attention_dim == 1024 else 1, "_v" if predicts_v else ""
        kind = ("-768-v" if predicts_v else "-512") if version == 2 else ""
        return f"sd_v{version}{mark}", f"stable-diffusion-v{version}{kind}"


FAMILY = StableDiffusion()
