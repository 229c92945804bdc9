"""FLUX.2 klein: patched latents, normalized by the autoencoder's statistics, and Qwen3 as text encoder."""

from typing import ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from .base import FLOW, Family

DOUBLE = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"


ORIGINAL = {
    **{f"transformer_blocks.{{}}.attn.to_{name}": "double_blocks.{}.img_attn.qkv" for name in "qkv"},
    **{f"transformer_blocks.{{}}.attn.add_{name}_proj": "double_blocks.{}.txt_attn.qkv" for name in "qkv"},
    "transformer_blocks.{}.attn.to_out.0": "double_blocks.{}.img_attn.proj",
    "transformer_blocks.{}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
    "transformer_blocks.{}.ff.linear_in": "double_blocks.{}.img_mlp.0",
    "transformer_blocks.{}.ff.linear_out": "double_blocks.{}.img_mlp.2",
    "transformer_blocks.{}.ff_context.linear_in": "double_blocks.{}.txt_mlp.0",
    "transformer_blocks.{}.ff_context.linear_out": "double_blocks.{}.txt_mlp.2",
    "single_transformer_blocks.{}.attn.to_qkv_mlp_proj": "single_blocks.{}.linear1",
    "single_transformer_blocks.{}.attn.to_out": "single_blocks.{}.linear2",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}


class Flux2Klein(Family):
    """FLUX.2 klein, trained as in diffusers' train_dreambooth_lora_flux2_klein.py.

    Unlike in that script, the attention layers for the text are adapted too.
    """

    name = "flux2_klein"
    editing: str | None = "flux2_edit.Flux2KleinEdit"
    pipeline = Flux2KleinPipeline
    denoiser_class = Flux2Transformer2DModel
    lora_files = ()
    layers: ClassVar = {
        "attention": f"{DOUBLE}|{SINGLE}",  # in SINGLE, one layer also computes the first half of the MLP
        "mlp": r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)",
    }
    original = ORIGINAL
    patch = 2
    latents_per_token = 1
    thinking: bool | None = False
    published: ClassVar = {  # the 9B model
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "guidance_embeds": False,
    }
    marks = ("flux2_klein", "flux-2-klein")
    defaults: ClassVar = {
        **FLOW,
        "guidance_scale": 4.0,
        "target_modules": [layers["attention"]],
    }

    def latent_shape(self, pipeline, height, width):
        """Return the shape in 2 x 2 patches: four times the channels at half the height and width."""
        channels, height, width = super().latent_shape(pipeline, height, width)
        return (channels * 4, height // 2, width // 2)

    def encode_captions(self, pipeline, captions, longest):
        """Return `states`: the hidden states of three of Qwen3's layers, concatenated (batch x tokens x 3 width)."""
        states, _ = pipeline.encode_prompt(captions, device=pipeline.text_encoder.device, max_sequence_length=longest)
        return {"states": states}

    def encode_images(self, vae, pixels):
        """Return mean and standard deviation of the latents in 2 x 2 patches."""
        moments = super().encode_images(vae, pixels).unbind(1)
        return torch.stack(list(map(self.pipeline._patchify_latents, moments)), dim=1)

    def scale_latents(self, vae, latents):
        """Return the latents, normalized by the running statistics of the autoencoder's batch norm."""
        mean, variance = (value.view(1, -1, 1, 1).to(latents) for value in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return packed latents, timesteps in [0, 1], text states, and position ids of text and image; no guidance."""
        states = conditions.text["states"]
        return {
            "hidden_states": self.pipeline._pack_latents(noisy),
            "timestep": timesteps / 1000,
            "guidance": None,
            "encoder_hidden_states": states,
            "txt_ids": self.pipeline._prepare_text_ids(states).to(noisy.device),
            "img_ids": self.pipeline._prepare_latent_ids(noisy).to(noisy.device),
        }

    def prediction(self, output, noisy):
        """Return the unpacked velocity."""
        return self.own_tokens(output, noisy).transpose(1, 2).reshape(noisy.shape)

    def model_version(self, config, predicts_v):
        """Return the two names of FLUX.2 klein in the model's size, which follows from its width."""
        size = "4b" if config.num_attention_heads * config.attention_head_dim <= 3072 else "9b"
        return f"flux2_klein_{size}", f"flux-2-klein-{size}"


FAMILY = Flux2Klein()
