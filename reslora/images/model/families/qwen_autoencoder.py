"""Base of the families with Qwen-Image's autoencoder: latents packed two by two, and text of any length."""

from collections.abc import Sequence

import torch
from diffusers import QwenImagePipeline
from torch.nn.utils.rnn import pad_sequence

from .base import Family, Text


class WithQwenAutoencoder(Family):
    """A flow on latents of `AutoencoderKLQwenImage`, which has a frame dimension: an image is one frame."""

    patch = 2
    channels = "z_dim"

    def encode_images(self, vae, pixels):
        """Return mean and standard deviation of the latents, without the frame dimension."""
        return super().encode_images(vae, pixels.unsqueeze(2)).squeeze(3)

    def scale_latents(self, vae, latents):
        """Return the latents, normalized by each channel's mean and standard deviation from the configuration."""
        config = vae.config
        mean, std = (latents.new_tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (latents - mean) / std

    def prediction(self, output, noisy):
        """Return the unpacked velocity."""
        tokens = self.own_tokens(output, noisy)
        return QwenImagePipeline._unpack_latents(tokens, *noisy.shape[2:], vae_scale_factor=1).squeeze(2)


def packed(noisy: torch.Tensor) -> torch.Tensor:
    """Return the latents with each 2 x 2 patch as one token, of shape (batch, tokens, 4 x channels)."""
    return QwenImagePipeline._pack_latents(noisy, *noisy.shape)


def without_padding(states: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the states of each caption (tokens x width) without padding.

    `states`: batch x tokens x width; `mask`: batch x tokens, or None if nothing is padded.
    """
    return list(states) if mask is None else [own[valid.bool()] for own, valid in zip(states, mask, strict=True)]


def side_by_side(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states padded with zeros, batch x tokens x width, and the mask, batch x tokens.

    The mask is True for tokens that are not padding.
    """
    padded = pad_sequence(list(states), batch_first=True)
    lengths = torch.tensor([len(own) for own in states])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(padded.device)


def prompt_inputs(text: Text, negative: Text, mask: str = "prompt_embeds_mask") -> dict:
    """Return a pipeline's arguments for the text states of captions and negative prompts, with the masks of their
    padding.

    A single negative prompt is used for all captions. `mask`: the name of the argument for the captions' mask.
    """
    captions, others = list(text["states"]), list(negative["states"])
    found: dict[str, torch.Tensor] = {}
    for prefix, states in (("", captions), ("negative_", others * (len(captions) // len(others)))):
        found[f"{prefix}prompt_embeds"], found[prefix + mask] = side_by_side(states)
    return found


def padded_inputs(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the padded states (batch x tokens x width) and the mask of `side_by_side`, given states (tokens x width).

    The mask is None if nothing is padded: attention is then faster.
    """
    alike = len({len(own) for own in states}) == 1
    padded, mask = side_by_side(states)
    return padded, None if alike else mask
