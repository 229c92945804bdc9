"""Qwen-Image: a two-stream transformer, with Qwen2.5-VL as text encoder."""

from typing import ClassVar

from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from .base import ATTENTION, FLOW
from .qwen_autoencoder import WithQwenAutoencoder, packed, padded_inputs, prompt_inputs, without_padding


class QwenImage(WithQwenAutoencoder):
    """Qwen-Image, trained as in diffusers' train_dreambooth_lora_qwen_image.py: the attention of the image stream."""

    name = "qwen_image"
    pipeline = QwenImagePipeline
    denoiser_class = QwenImageTransformer2DModel
    guidance = "true_cfg_scale"
    version = ("qwen_image", "qwen-image")
    marks = version
    one_size = True
    unread = ("attn.to_add_out", "txt_mlp")  # the text stream's last output
    defaults: ClassVar = {
        **FLOW,
        "num_inference_steps": 50,
        "guidance_scale": 4.0,
        "target_modules": [*ATTENTION[:4]],
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
        # The length at which the pipeline truncates captions.
        return prompt_inputs(text, negative) | {"max_sequence_length": pipeline.tokenizer_max_length}


FAMILY = QwenImage()
