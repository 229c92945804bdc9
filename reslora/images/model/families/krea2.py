"""Krea 2: a single-stream transformer with a text fusion transformer over several layers of Qwen3-VL."""

from typing import ClassVar

from diffusers import Krea2Pipeline, Krea2Transformer2DModel

from ....export import COMFYUI_FILE
from .base import FLOW
from .qwen_autoencoder import WithQwenAutoencoder, packed, padded_inputs, side_by_side, without_padding

LAYERS = {
    "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate", "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down",
}  # fmt: skip
BLOCKS = {
    "transformer_blocks": "blocks",
    "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
    "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
}
ORIGINAL = {f"{ours}.{{}}.{a}": f"{theirs}.{{}}.{b}" for ours, theirs in BLOCKS.items() for a, b in LAYERS.items()} | {
    "img_in": "first",
    "final_layer.linear": "last.linear",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
}


class Krea2(WithQwenAutoencoder):
    """Krea 2, trained as in diffusers' train_dreambooth_lora_krea2.py, but without `text_fusion.projector`.

    That layer has only one output. The pipeline pads text states to the maximum length. The loss uses text
    states without padding. Leaving the padding out is equivalent, because the pipeline masks the padding, and text has
    no positions.
    """

    name = "krea2"
    pipeline = Krea2Pipeline
    denoiser_class = Krea2Transformer2DModel
    lora_files = (COMFYUI_FILE,)
    unguided = 0.0
    layers: ClassVar = {"attention": r".*\.attn\.to_([qkv]|out\.0|gate)", "mlp": r".*\.ff\.(gate|up|down)"}
    original = ORIGINAL
    version = ("krea2", "krea-2")
    marks = version
    defaults: ClassVar = {
        **FLOW,
        "guidance_scale": 4.5,
        "target_modules": [
            *("img_in", "final_layer.linear", "to_q", "to_k", "to_v", "to_out.0", "to_gate", "ff.up", "ff.down"),
            *("txt_in.linear_1", "txt_in.linear_2", "time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
        ],
    }

    def token_counts(self, pipeline, tokenizer, captions):
        """Return the number of tokens of each caption, with the template's suffix and without its prefix.

        The pipeline drops the text states of the prefix.
        """
        begun = [pipeline.prompt_template_encode_prefix + caption for caption in captions]
        around = pipeline.prompt_template_encode_num_suffix_tokens - pipeline.prompt_template_encode_start_idx
        return [count + around for count in super().token_counts(pipeline, tokenizer, begun)]

    def encode_captions(self, pipeline, captions, longest):
        """Return `states`: a list of (tokens x layers x width), with the tokens of the caption and the suffix."""
        needed = max(self.token_counts(pipeline, pipeline.tokenizer, captions))  # else padding is encoded, too
        states, mask = pipeline.encode_prompt(
            captions, device=pipeline.text_encoder.device, max_sequence_length=min(longest, needed)
        )
        return {"states": without_padding(states, mask)}

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return packed latents, timesteps in [0, 1], text states with their mask, and position ids."""
        height, width = noisy.shape[2:]
        states, mask = padded_inputs(conditions.text["states"])
        return {
            "hidden_states": packed(noisy),
            "encoder_hidden_states": states,
            "timestep": timesteps / 1000,
            "position_ids": Krea2Pipeline.prepare_position_ids(
                states.shape[1], height // 2, width // 2, noisy.device
            ),
            "encoder_attention_mask": mask,
        }  # fmt: skip

    def sampling_inputs(self, pipeline, text, negative, empty):
        """Return text states of captions and negative prompt, padded to one length, as the pipeline requires."""
        states, count = list(text["states"]), len(text["states"])
        both, mask = side_by_side([*states, *[negative["states"][0]] * count])
        return {
            "prompt_embeds": both[:count],
            "prompt_embeds_mask": mask[:count],
            "negative_prompt_embeds": both[count:],
            "negative_prompt_embeds_mask": mask[count:],
        }


FAMILY = Krea2()
