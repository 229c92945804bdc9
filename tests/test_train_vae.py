"""The script that trains the bundled autoencoder, its training sets, and the measure of sharpness."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

ASSETS = Path(__file__).resolve().parent.parent / "assets"
sys.path.insert(0, str(ASSETS / "make"))

import train_vae  # noqa: E402
from augment import held_out, move  # noqa: E402
from make_data import icon_name, icon_svg  # noqa: E402
from sharpness import compared, gradients, reconstruct  # noqa: E402

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


def test_coarse_images_are_decoded_from_sixteen_channels(images, monkeypatch):
    vae, decoded = train_vae.new_vae(32), []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda latents: decoded.append(latents) or decode(latents))
    args = argparse.Namespace(coarse=0.5, edges=1.0, kl=1e-4)
    train_vae.loss_of(vae, images.repeat(16, 1, 1, 1), torch.Generator().manual_seed(0), args)
    used = decoded[0].abs().amax((2, 3)) > 0
    assert used[:, :16].all() and 4 < used[:, 16:].all(1).sum() < 28
    assert torch.equal(used[:, 16:].all(1), used[:, 16:].any(1))


def test_a_resumed_training_sees_the_batches_of_an_unbroken_one():
    pictures = torch.randint(256, (40, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    args = argparse.Namespace(seed=3, batch=16)
    first, again = (train_vae.batch_at(7, pictures, args)[0] for _ in range(2))
    assert first.shape == (16, 3, 64, 64) and torch.equal(first, again)
    assert not torch.equal(first, train_vae.batch_at(8, pictures, args)[0])


def test_gradients_tell_sharp_from_soft(images):
    # A square of side 32 has 4 edges of 32 pixels, each a step of 2.
    assert gradients(images[:1])[0] == pytest.approx(2 * 4 * 32 / (2 * 63 * 64))
    assert gradients(images[:1])[1] == pytest.approx(4 * 4 * 32 / (2 * 63 * 64))
    soft = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert compared(images, images) == {"gradients": 1, "gradient_energy": 1}
    assert compared(soft, images)["gradient_energy"] < 0.6


def test_images_of_twice_the_size_are_moved_without_blurring(images):
    large = images[:1].repeat_interleave(2, -1).repeat_interleave(2, -2).repeat(32, 1, 1, 1)
    small = images[:1].repeat(32, 1, 1, 1)
    sharp, soft = (move(x, torch.Generator().manual_seed(0), largest=1.0) for x in (large, small))
    assert sharp.shape == soft.shape
    assert (sharp - soft).abs().mean() < 0.05
    assert gradients(sharp)[1] > 1.1 * gradients(soft)[1]


def test_one_emoji_in_sixteen_is_held_out_in_all_sets_alike():
    rows = [{"file_name": f"{number:x}.png"} for number in range(1600)]
    assert 70 < sum(map(held_out, rows)) < 130


ICONS = {
    "chars": {"1f34e": "red-apple"},
    "icons": {"red-apple": {"body": "<path/>"}, "catface": {"body": "<g/>", "width": 9}, "pizza-1": {"body": ""}},
    "aliases": {"apple": {"parent": "red-apple"}},
    "width": 8,
    "height": 8,
}


@pytest.mark.parametrize(
    ("style", "points", "caption", "name"),
    [
        ("twemoji", "1f34e-fe0f", "fruit", "red-apple"),
        ("blob", "1f34f", "apple", "apple"),
        ("firefox", "1f431", "cat face", "cat"),
        ("firefox", "1f43a", "cat-face", "catface"),
        ("streamline", "1f355", "pizza", "pizza-1"),
        ("emojione", "1f355", "burger", None),
        ("emojione", "1f997", "cricket", None),
    ],
)
def test_icons_are_found_by_code_points_captions_and_other_names(style, points, caption, name):
    icons = ICONS | {"icons": ICONS["icons"] | {"cat": {"body": ""}, "cricket": {"body": ""}}}
    assert icon_name(style, {"file_name": f"{points}.png", "text": caption}, "", icons) == name


def test_icons_keep_their_size_and_aliases_lead_to_them():
    assert 'viewBox="0 0 8 8"' in icon_svg("apple", ICONS) and icon_svg("apple", ICONS).endswith("<path/></svg>")
    assert 'viewBox="0 0 9 8"' in icon_svg("catface", ICONS)
