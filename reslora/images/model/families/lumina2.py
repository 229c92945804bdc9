"""Lumina Image 2.0: Gemma 2 as text encoder, a system prompt before each caption, and time from noise to image."""

from typing import ClassVar

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

from .base import FLOW, LAYERS, Family
from .qwen_autoencoder import side_by_side, without_padding

LAYERS_OF_BLOCKS = {
    **{f"attn.to_{name}": "attention.qkv" for name in "qkv"},
    "attn.to_out.0": "attention.out",
    **{f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
    "norm1.linear": "adaLN_modulation.1",
}
ORIGINAL = {
    f"{blocks}.{{}}.{ours}": f"{blocks}.{{}}.{theirs}"
    for blocks in ("noise_refiner", "context_refiner", "layers")
    for ours, theirs in LAYERS_OF_BLOCKS.items()
} | {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}


class Lumina2(Family):
    """Lumina Image 2.0, trained on the layers of diffusers' train_dreambooth_lora_lumina2.py.

    Noise levels are shifted as in the pipeline, towards noise; that script shifts them towards the image. As in the
    pipeline and in the model's original code, the empty caption has no system prompt. Unlike in the pipeline, negative
    prompts that are not empty have a system prompt, because they are encoded like captions.
    """

    name = "lumina2"
    pipeline = Lumina2Pipeline
    denoiser_class = Lumina2Transformer2DModel
    lora_files = ()
    layers: ClassVar = {"attention": LAYERS["attention"], "mlp": r".*\.feed_forward\.linear_[123]"}
    original = ORIGINAL
    patch = 2
    published: ClassVar = {"cap_feat_dim": 2304}
    one_size = True
    most_tokens = 299  # the image's position follows those of the caption, and the denoiser has 300
    version = ("lumina2", "lumina-2")
    marks = version
    defaults: ClassVar = {
        **FLOW,
        "resolution": 1024,
        "num_inference_steps": 30,
        "guidance_scale": 4.0,
        "max_sequence_length": 256,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    }

    def token_counts(self, pipeline, tokenizer, captions):
        """Return the number of tokens of each caption with the system prompt, whose text states the denoiser gets."""
        return super().token_counts(pipeline, tokenizer, with_system_prompt(pipeline, captions))

    def encode_captions(self, pipeline, captions, longest):
        """Return `states`: a list of (tokens x width), with the tokens of system prompt and caption."""
        # Encode the captions as negative prompts: to other prompts, even empty ones, the pipeline adds its system
        # prompt.
        ignored = torch.zeros(len(captions), 1, 1)
        *_, states, mask = pipeline.encode_prompt(
            None, negative_prompt=with_system_prompt(pipeline, captions), device=pipeline.text_encoder.device,
            prompt_embeds=ignored, prompt_attention_mask=ignored[..., 0], max_sequence_length=longest,
        )  # fmt: skip
        return {"states": without_padding(states, mask)}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return the latents, `1 - timesteps / 1000`, and text states with the mask of their padding."""
        states, mask = side_by_side(conditions.text["states"])
        return {
            "hidden_states": noisy,
            "timestep": (1000 - timesteps) / 1000,
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
        }

    def prediction(self, output, noisy):
        """Return the velocity, which is the negated output."""
        return -output[0]

    def sampling_inputs(self, pipeline, text, negative, empty):
        """Return text states of captions and negative prompt, padded to one length, as the pipeline requires."""
        states, count = list(text["states"]), len(text["states"])
        both, mask = side_by_side([*states, *[negative["states"][0]] * count])
        return {
            "prompt_embeds": both[:count],
            "prompt_attention_mask": mask[:count],
            "negative_prompt_embeds": both[count:],
            "negative_prompt_attention_mask": mask[count:],
        }


def with_system_prompt(pipeline: Lumina2Pipeline, captions: list[str]) -> list[str]:
    """Return the captions after the pipeline's system prompt; the empty caption stays empty."""
    return [f"{pipeline.system_prompt} <Prompt Start> {caption}" if caption else "" for caption in captions]


FAMILY = Lumina2()
