"""The script that trains the bundled autoencoder's decoder to generate sharp images from blurred latents."""

import argparse
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

ASSETS = Path(__file__).resolve().parent.parent / "assets"
sys.path.insert(0, str(ASSETS / "make"))

import sharpen_decoder  # noqa: E402
from sharpen_decoder import Examples, Training, critic_loss, decoder_loss, guess  # noqa: E402
from train_vae import image_error, new_vae  # noqa: E402

pytestmark = pytest.mark.exhaustive


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_denoiser_that_knows_the_noise_guesses_the_latents(kind):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler(prediction_type=kind)

    def unet(noisy, timesteps, states):
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        return SimpleNamespace(
            sample=noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        )

    def tokenizer(captions, **_):
        return SimpleNamespace(input_ids=torch.zeros(len(captions), 2, dtype=torch.long))

    pipeline = SimpleNamespace(
        scheduler=scheduler, tokenizer=tokenizer, text_encoder=lambda tokens: (tokens,), unet=unet
    )
    torch.testing.assert_close(guess(pipeline, latents, ["a", "b", ""], 600), latents, rtol=0, atol=1e-3)


@pytest.fixture
def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=generator)
    exact, vague = torch.randn(2, 6, 32, 8, 8, generator=generator).half()
    return Examples(images, exact, vague, torch.arange(6) == 5)


def settings(folder: Path, **changed) -> argparse.Namespace:
    known = {"output": str(folder), "steps": 4, "batch": 3, "lr": 1e-3, "critic_lr": 1e-3, "penalty": 0.1, "seed": 0}
    return argparse.Namespace(**known | {"critic_from": 1, "share": 0.5, "largest": 0.3, "ema": 0.9} | changed)


def test_the_decoder_alone_is_trained_and_goes_on_after_a_kill(examples, tmp_path):
    torch.manual_seed(0)
    vae, args = new_vae(32), settings(tmp_path)
    before, again = copy.deepcopy(vae.state_dict()), copy.deepcopy(vae)
    whole = Training(vae, args)
    state = copy.deepcopy(whole.critic.state_dict())
    for step in range(4):
        whole.step(step, examples)
        if step == 1:
            sharpen_decoder.save_checkpoint(tmp_path / "checkpoint.pt", whole.parts, 2)
    changed = {name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert any(not torch.equal(value, state[name]) for name, value in whole.critic.state_dict().items())
    resumed = Training(again, args)
    assert sharpen_decoder.load_checkpoint(tmp_path / "checkpoint.pt", resumed.parts) == 2
    for step in (2, 3):
        resumed.step(step, examples)
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in again.state_dict().items())
    whole.report(4, examples)
    assert (tmp_path / "config.json").is_file() and '"vague"' in (tmp_path / "loss.jsonl").read_text()


def test_the_critic_compares_an_image_with_its_own_decoded_one_and_pays_for_its_slope():
    critic = nn.Conv2d(3, 1, 2, stride=2, bias=False)
    images, made = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = critic_loss(critic, made, images, 0.7)
    says = (critic(images) - critic(made)).flatten()
    # Each pixel is seen once, in one of four neighbourhoods of its image.
    slope = 4 * (critic.weight / 4).square().sum()
    torch.testing.assert_close(found, (1 + (-says).exp()).log().mean() + 0.7 * slope)
    torch.testing.assert_close(critic_loss(critic, made, images, 0), (1 + (-says).exp()).log().mean())


@pytest.mark.parametrize("largest", [0, 1e-4, 1e4])
def test_the_critics_gradient_is_a_share_of_the_errors(largest):
    vae, critic = new_vae(32), nn.Conv2d(3, 1, 2, stride=2)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = vae.decode(torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(1))).sample
    last = vae.decoder.conv_out.weight
    error, told = image_error(made - images), nn.functional.softplus(critic(images) - critic(made)).mean()
    of_error, of_critic = (torch.autograd.grad(x, last, retain_graph=True)[0] for x in (error, told))
    weight = min(0.5 * (of_error.norm() / of_critic.norm()).item(), largest)
    found = decoder_loss(vae, critic, made, images, argparse.Namespace(share=0.5, largest=largest))
    (gradient,) = torch.autograd.grad(found, last)
    torch.testing.assert_close(gradient, of_error + weight * of_critic, rtol=1e-3, atol=1e-6)
