"""The bundled flow-matching pipeline, and the script that makes it: the stock convention, and resuming."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from torch import nn

ASSETS = Path(__file__).resolve().parent.parent / "assets"
sys.path.insert(0, str(ASSETS / "make"))

import train_flow  # noqa: E402
import training  # noqa: E402
from captions import VALIDATION_PROMPTS  # noqa: E402
from flow_model import (  # noqa: E402
    DRAW_TOKENS,
    caption_tokens,
    check_velocity,
    new_flow_pipeline,
    new_flow_text_encoder,
    new_flow_tokenizer,
    new_transformer,
)

pytestmark = pytest.mark.exhaustive

CAPTIONS = [f"{colour} {thing}" for colour in ("red", "blue", "green", "grey") for thing in ("apple", "t-shirt", "cat")]


@pytest.fixture
def tokenizer():
    return new_flow_tokenizer(CAPTIONS)


@pytest.fixture
def text_encoder(tokenizer):
    torch.manual_seed(0)
    return new_flow_text_encoder(tokenizer)


@pytest.fixture
def transformer():
    """A tiny transformer without zero weights."""
    torch.manual_seed(0)
    transformer = new_transformer(dim=32, layers=2, heads=2)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return transformer


def new_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    widths = (4, 4, 4, 4)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=0.5,
    )


def test_quick_forward_is_the_stock_one(transformer):
    # The stock forward's rotary positions are single precision whatever the weights are.
    assert check_velocity(transformer.double()) < 1e-6


@pytest.mark.parametrize("part", ["x_pad_token", "cap_pad_token"])
def test_quick_forward_sees_the_padding(transformer, part, monkeypatch):
    transformer = transformer.double()
    stock = type(transformer).forward

    def without_padding(self, *args, **kwargs):
        kept = getattr(self, part).data.clone()
        getattr(self, part).data.zero_()
        out = stock(self, *args, **kwargs)
        getattr(self, part).data = kept
        return out

    monkeypatch.setattr(type(transformer), "forward", without_padding)
    assert check_velocity(transformer) > 1e-3


def test_captions_end_in_draw_tokens_and_none_is_unknown(tokenizer):
    tokens = caption_tokens(tokenizer, ["Red T-shirt", "", "outlined cat"])
    rows = [tokenizer.convert_ids_to_tokens(row) for row in tokens]
    assert rows[0] == ["red", "t", "shirt", *DRAW_TOKENS]
    assert rows[1] == [*DRAW_TOKENS, "<pad>", "<pad>", "<pad>"]
    assert rows[2] == ["outlined", "cat", *DRAW_TOKENS, "<pad>"]


def test_training_reads_captions_as_the_stock_pipeline_does(tokenizer, text_encoder, transformer):
    pipeline = new_flow_pipeline(new_vae(), text_encoder, tokenizer, transformer)
    captions = ["red apple", "green t-shirt"]
    with torch.no_grad():
        stock, stock_empty = pipeline.encode_prompt(list(captions), device="cpu")
        tokens = caption_tokens(tokenizer, [*captions, ""])
        ours = text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
        read = train_flow.read_draw_tokens(text_encoder, tokens)
    lengths = train_flow.lengths(tokens, text_encoder)
    assert lengths.tolist() == [6, 7, 4]
    for features, length, theirs in zip(ours, lengths, [*stock, stock_empty[0]], strict=True):
        torch.testing.assert_close(features[:length], theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read[0].view(len(DRAW_TOKENS), -1), ours[0, 2:6])


def exact_flow(latents: torch.Tensor):
    """Return the forward function of a transformer that knows the latents (C, H, W) of every image: latents - noise."""

    def forward(noisy, time, features, lengths):
        return (latents - noisy) / (1 - time.view(-1, 1, 1, 1))

    return forward


def test_loss_is_zero_for_the_exact_flow_and_one_too_much_for_none(tokenizer, text_encoder):
    latents = torch.randn(16, 8, 8)
    batch, tokens = latents.expand(64, -1, -1, -1), caption_tokens(tokenizer, ["red apple"] * 64)
    generator = torch.Generator().manual_seed(0)
    assert train_flow.flow_loss(exact_flow(latents), text_encoder, batch, tokens, generator) < 1e-4
    still = train_flow.flow_loss(lambda noisy, *_: 0 * noisy, text_encoder, batch, tokens, generator)
    assert still.item() == pytest.approx(1 + latents.square().mean().item(), rel=0.03)


def test_stock_pipeline_draws_what_the_exact_flow_knows(tokenizer, text_encoder, transformer, monkeypatch):
    latents = torch.randn(16, 8, 8)

    def stock(self, x, time, captions, **kwargs):
        flow = exact_flow(latents)(torch.stack(x).squeeze(2), time, None, None)
        return (list(flow.unsqueeze(2)),)

    monkeypatch.setattr(type(transformer), "forward", stock)
    pipeline = new_flow_pipeline(new_vae(), text_encoder, tokenizer, transformer)
    drawn = pipeline("red apple", height=64, width=64, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(drawn[0], latents, rtol=1e-4, atol=1e-4)


def test_noise_levels_cover_all_and_favour_the_noisier_half():
    levels = train_flow.noise_levels(64, torch.Generator().manual_seed(0))
    assert levels.min() < 0.1 and levels.max() > 0.95 and (levels.diff() > 0).all()
    assert 0.55 < (levels > 0.5).float().mean() < 0.75


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """Train tiny models in a folder; `failing`: the call of the loss that fails, as if the process were killed."""
    monkeypatch.setattr(training, "draw", lambda pipeline, prompts: [Image.new("RGB", (4, 4))])
    monkeypatch.setattr(training, "sample_prompts", lambda examples: examples.captions[:1])
    torch.manual_seed(1)
    tokens = caption_tokens(tokenizer, CAPTIONS)
    every = tokens[:, None, None].repeat(1, len(training.STYLES), 2, 1)
    latents = torch.randn(len(CAPTIONS), 3 + training.HELD_OUT_VARIANTS, 16, 8, 8).half()
    known, styles = len(CAPTIONS) - 2, ["plain", "plain", "grey"]
    examples = training.Examples(CAPTIONS, ["noto"] * len(CAPTIONS), known, styles, every, tokens, latents)

    def train(name: str, steps: int, failing: int | None = None):
        (tmp_path / name).mkdir(exist_ok=True)
        parser = argparse.ArgumentParser()
        training.add_arguments(parser)
        args = parser.parse_args(["--cooldown", "2", "--report_every", "1", "--mixed_precision", "no"])
        args.output, args.steps, args.batch = str(tmp_path / name), steps, 4
        torch.manual_seed(2)
        text_encoder, transformer = new_flow_text_encoder(tokenizer), new_transformer(dim=32, layers=1, heads=2)
        forward, calls = train_flow.new_forward(transformer, 8, compiled=False), []

        def loss_of(latents, tokens, generator):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == failing:
                raise KeyboardInterrupt
            return train_flow.flow_loss(forward, text_encoder, latents, tokens, generator)

        pipeline = new_flow_pipeline(new_vae(), text_encoder, tokenizer, transformer)
        modules = {"transformer": transformer, "text_encoder": text_encoder}
        training.train(args, modules, pipeline, examples, tokens[0], loss_of, begin=lambda: None)
        return tmp_path / name

    return train


def weights(folder: Path) -> dict:
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    return {**pipeline.transformer.state_dict(), **pipeline.text_encoder.state_dict()}


@pytest.mark.parametrize("failing", [2, 4], ids=["steady", "cooldown"])
def test_a_killed_training_ends_as_an_unbroken_one(run, failing):
    unbroken = weights(run("unbroken", steps=4))
    with pytest.raises(KeyboardInterrupt):
        run("killed", steps=4, failing=failing)
    resumed = weights(run("killed", steps=4))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_longer_training_goes_on_from_before_the_cooldown(run):
    run("grown", steps=3)
    grown, long = weights(run("grown", steps=5)), weights(run("long", steps=5))
    assert all(torch.equal(grown[name], long[name]) for name in grown)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_what_is_written_draws_in_stock_diffusers(run, dtype):
    folder = run("short", steps=2) / "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder, **({"dtype": dtype} if dtype else {}))
    assert isinstance(pipeline, ZImagePipeline) and isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    assert {module.dtype for module in modules} == {dtype or torch.float32}
    images = pipeline(["red apple", "cat"], height=64, width=64, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_bundled_flow_pipeline_draws_on_white_in_every_dtype(dtype):
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "pipeline-flow", **({"dtype": dtype} if dtype else {}))
    pipeline.set_progress_bar_config(disable=True)
    modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    assert {module.dtype for module in modules} == {dtype or torch.float32}
    setting = {"num_inference_steps": 10, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "pt"}
    image = pipeline("red apple", generator=torch.Generator().manual_seed(0), **setting).images[0].float()
    assert image.shape == (3, 64, 64) and image[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.9
    red, green, blue = image[:, 24:40, 24:40].mean((1, 2))
    assert red > 0.6 and green < 0.5 and blue < 0.5


def test_bundled_flow_pipeline_is_deep_and_small_and_has_the_other_ones_autoencoder():
    folder = ASSETS / "pipeline-flow"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 25 * 2**20
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert len(pipeline.transformer.layers) >= 12 and check_velocity(pipeline.transformer) < 1e-4
    other = AutoencoderKL.from_pretrained(ASSETS / "pipeline" / "vae").state_dict()
    assert all(torch.equal(other[name], weight) for name, weight in pipeline.vae.state_dict().items())
    tokens = caption_tokens(pipeline.tokenizer, list(VALIDATION_PROMPTS))
    assert pipeline.tokenizer.unk_token_id not in tokens


def test_captions_lose_their_set_their_subject_or_all_apart(tokenizer):
    every = torch.arange(4 * len(training.STYLES) * 2).view(4, len(training.STYLES), 2, 1) + 1
    latents = torch.zeros(4, 2 + training.HELD_OUT_VARIANTS, 1, 1, 1)
    examples = training.Examples(
        ["a", "a", "b", "c"], ["noto"] * 4, 3, ["plain", "grey"], every, -every[:, 0, 0], latents
    )
    args = argparse.Namespace(seed=0, batch=4000, steps=9, cooldown=1, caption_dropout=0.1, subject_dropout=0.2)
    args.set_dropout, args.sets = 0.3, ["noto", "blob"]
    tokens = training.training_batch(examples, 0, torch.zeros(1, dtype=torch.long), args)[1].flatten()
    assert (tokens == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (tokens < 0).float().mean().item() == pytest.approx(0.9 * 0.2, abs=0.02)
    whole = tokens[tokens > 0]
    assert (whole % 2 == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert whole.max() <= every[2].max()  # the last picture is held out
    of_first, of_third = (((whole - 1) // (2 * len(training.STYLES))) == i for i in (0, 2))
    # Two sets draw "a" and one "b": "a" is met more often, each drawing of it less.
    assert of_third.float().mean() / of_first.float().mean() == pytest.approx(2**0.5, abs=0.15)
    args.sets = ["noto"]  # which then no caption names
    tokens = training.training_batch(examples, 0, torch.zeros(1, dtype=torch.long), args)[1].flatten()
    assert (tokens >= 0).all() and (tokens[tokens > 0] % 2 == 0).all()


def test_a_start_from_another_autoencoders_denoiser_leaves_new_what_reads_and_writes_latents(tmp_path, capsys):
    earlier, later = (new_transformer(dim=32, layers=2, heads=2, channels=channels) for channels in (4, 8))
    earlier.save_pretrained(tmp_path / "transformer")
    before = {name: weight.clone() for name, weight in later.state_dict().items()}
    training.start_from(str(tmp_path), {"transformer": later})
    new, saved, told = later.state_dict(), earlier.state_dict(), capsys.readouterr().out
    other = {name for name, weight in new.items() if weight.shape != saved[name].shape}
    assert 0 < len(other) < 6 and all(name in told for name in other)
    assert all(torch.equal(weight, (before if name in other else saved)[name]) for name, weight in new.items())
