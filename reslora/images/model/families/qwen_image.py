"""Qwen-Image: a two-stream transformer, with Qwen2.5-VL as text encoder."""

from typing import ClassVar

from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from .base import FLOW
from .qwen_autoencoder import WithQwenAutoencoder, packed, padded_inputs, side_by_side, without_padding


class QwenImage(WithQwenAutoencoder):
    """Qwen-Image, trained as in diffusers' train_dreambooth_lora_qwen_image.py: the attention of the image stream."""

    name = "qwen_image"
    pipeline = QwenImagePipeline
    denoiser_class = QwenImageTransformer2DModel
    guidance = "true_cfg_scale"
    version = ("qwen_image", "qwen-image")
    marks = ("qwen_image", "qwen-image")
    one_size = True
    unread = ("attn.to_add_out", "txt_mlp")  # the text stream's last output
    defaults: ClassVar = {
        **FLOW,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    }

    def token_counts(self, pipeline, tokenizer, captions):
        """Return the number of tokens of each caption in the template, without the prefix that the pipeline drops."""
        whole = [pipeline.prompt_template_encode.format(caption) for caption in captions]
        dropped = pipeline.prompt_template_encode_start_idx
        return [count - dropped for count in super().token_counts(pipeline, tokenizer, whole)]

    def encode_captions(self, pipeline, captions, longest):
        """Return `states`: a list of (tokens x width), with the tokens of the caption and of the template's suffix."""
        states, mask = pipeline.encode_prompt(
            captions, device=pipeline.text_encoder.device, max_sequence_length=longest
        )
        return {"states": without_padding(states, mask)}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return packed latents, timesteps in [0, 1], text states, their mask, and `(1, rows, columns)` by image."""
        batch, _, height, width = noisy.shape
        states, mask = padded_inputs(conditions.text["states"])
        return {
            "hidden_states": packed(noisy),
            "timestep": timesteps / 1000,
            "encoder_hidden_states": states,
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, height // 2, width // 2)]] * batch,
        }

    def sampling_inputs(self, pipeline, text, negative, empty):
        """Return text states of the captions and of the negative prompt, which guidance requires."""
        states, mask = side_by_side(text["states"])
        others, others_mask = side_by_side([negative["states"][0]] * len(states))
        return {
            "prompt_embeds": states,
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": others,
            "negative_prompt_embeds_mask": others_mask,
            "max_sequence_length": pipeline.tokenizer_max_length,  # the length at which the pipeline truncates them
        }


FAMILY = QwenImage()
