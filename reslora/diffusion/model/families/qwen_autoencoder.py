"""What families share that have Qwen-Image's autoencoder: its latents, packed two by two, and text of any length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import QwenImagePipeline
from torch.nn.utils.rnn import pad_sequence

from .base import Family


class WithQwenAutoencoder(Family):
    """A flow on latents of `AutoencoderKLQwenImage`, which has an axis of frames: an image is one frame."""

    denoiser = "transformer"
    objective = "flow"
    patch = 2

    def latent_shape(self, pipeline, height, width):
        """The autoencoder has its own word for channels."""
        factor = pipeline.vae_scale_factor
        return (pipeline.vae.config.z_dim, height // factor, width // factor)

    def encode_images(self, vae, pixels):
        """Mean and standard deviation of the latents of the only frame."""
        return super().encode_images(vae, pixels.unsqueeze(2)).squeeze(3)

    def scale_latents(self, vae, latents):
        """Latents normalised by each channel's mean and standard deviation, which the configuration has."""
        config = vae.config
        mean, std = (latents.new_tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (latents - mean) / std

    def prediction(self, output, noisy):
        """The velocity, unpacked."""
        return QwenImagePipeline._unpack_latents(output[0], *noisy.shape[2:], vae_scale_factor=1).squeeze(2)


def packed(noisy: torch.Tensor) -> torch.Tensor:
    """Two by two latents as one token: batch x tokens x 4 channels."""
    return QwenImagePipeline._pack_latents(noisy, *noisy.shape)


def without_padding(states: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Each caption's states at its own length; no mask: all are as long."""
    return list(states) if mask is None else [own[valid.bool()] for own, valid in zip(states, mask, strict=True)]


def side_by_side(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of captions of any length as one tensor, with zeros behind the shorter ones; and what is none of these."""
    padded = pad_sequence(list(states), batch_first=True)
    lengths = torch.tensor([len(own) for own in states])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).to(padded.device)


def padded_inputs(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `side_by_side`, but without a mask where nothing is padded: attention is faster then."""
    alike = len({len(own) for own in states}) == 1
    padded, mask = side_by_side(states)
    return padded, None if alike else mask
