"""The script that trains the bundled autoencoder."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

ASSETS = Path(__file__).resolve().parent.parent / "assets"
sys.path.insert(0, str(ASSETS / "make"))

import train_vae  # noqa: E402
from sharpness import reconstruct  # noqa: E402

pytestmark = pytest.mark.exhaustive


@pytest.fixture
def images() -> torch.Tensor:
    """Two images of 64x64 with sharp edges."""
    images = torch.ones(2, 3, 64, 64)
    images[0, :, 16:48, 16:48] = -1
    images[1, 0, ::4] = 0
    return images


def test_more_channels_start_as_the_same_function_and_can_learn(images):
    old, new = AutoencoderKL.from_pretrained(ASSETS / "pipeline" / "vae"), train_vae.new_vae(48)
    train_vae.start_from(ASSETS / "pipeline" / "vae", new)
    torch.testing.assert_close(reconstruct(new, images), reconstruct(old, images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new.encode(images).latent_dist.mean[:, :32], old.encode(images).latent_dist.mean)
    args = argparse.Namespace(coarse=0.0, edges=1.0, kl=1e-4)
    train_vae.loss_of(new, images, torch.Generator().manual_seed(0), args)[0].backward()
    assert new.decoder.conv_in.weight.grad[:, 32:].abs().max() > 0
