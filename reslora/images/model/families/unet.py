"""Base of the families with a U-Net, and the names of its layers in Stability AI's code.

Single-file checkpoints, ComfyUI and kohya's scripts for SDXL have these names.
"""

import re
from collections.abc import Mapping

from diffusers import UNet2DConditionModel

from .base import Family

# The layers of a residual block, by their names in diffusers.
RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2",
}  # fmt: skip


class WithUNet(Family):
    """A U-Net that predicts epsilon or v."""

    denoiser = "unet"
    denoiser_class = UNet2DConditionModel
    objective = "ddpm"

    def denoiser_inputs(self, config, noisy, timesteps, conditions):
        """Return the sample, the timestep and the text states."""
        return {"sample": noisy, "timestep": timesteps, "encoder_hidden_states": conditions.text["states"]}

    def original_name(self, config, name):
        """Return the name in Stability AI's code."""
        return stability_name(config, name)


def stability_name(config: Mapping, name: str) -> str:
    """Return a layer's name in Stability AI's code; unknown names are returned unchanged.

    For example, with two layers per level, `down_blocks.1.attentions.0.x` becomes `input_blocks.4.1.x`.
    """
    match = re.fullmatch(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", name)
    if match is None:
        return OUTSIDE.get(name, name)
    side, level, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    layers = config["layers_per_block"] + 1
    if kind == "resnets":
        first, dot, last = rest.partition(".")
        rest = RESIDUAL.get(first, first) + dot + last
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * layers}.0.op"
    if kind == "upsamplers":
        place = 2 if "Attn" in config["up_block_types"][level] else 1
        return f"output_blocks.{(level + 1) * layers - 1}.{place}.{rest}"
    number = level * layers + layer
    block = f"input_blocks.{number + 1}" if side == "down_blocks" else f"output_blocks.{number}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{rest}"
