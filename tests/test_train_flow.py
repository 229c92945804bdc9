"""The bundled flow-matching pipeline, and the script that makes it."""

import argparse
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImagePipeline

ASSETS = Path(__file__).resolve().parent.parent / "assets"
sys.path.insert(0, str(ASSETS / "make"))

import train_flow  # noqa: E402
import training  # noqa: E402
from captions import VALIDATION_PROMPTS  # noqa: E402
from flow_model import (  # noqa: E402
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


@pytest.fixture
def run(tmp_path, tokenizer):
    """Train tiny models in a folder."""
    torch.manual_seed(1)
    tokens = caption_tokens(tokenizer, CAPTIONS)
    every = tokens[:, None, None].repeat(1, len(training.STYLES), 2, 1)
    latents = torch.randn(len(CAPTIONS), 3 + training.HELD_OUT_VARIANTS, 16, 8, 8).half()
    known, styles = len(CAPTIONS) - 2, ["plain", "plain", "grey"]
    examples = training.Examples(CAPTIONS, ["noto"] * len(CAPTIONS), known, styles, every, tokens, latents)

    def train(name: str, steps: int):
        (tmp_path / name).mkdir(exist_ok=True)
        parser = argparse.ArgumentParser()
        training.add_arguments(parser)
        args = parser.parse_args(["--cooldown", "2", "--report_every", "1", "--mixed_precision", "no"])
        args.output, args.steps, args.batch = str(tmp_path / name), steps, 4
        torch.manual_seed(2)
        text_encoder, transformer = new_flow_text_encoder(tokenizer), new_transformer(dim=32, layers=1, heads=2)
        forward = train_flow.new_forward(transformer, 8, compiled=False)

        def loss_of(latents, tokens, generator):
            return train_flow.flow_loss(forward, text_encoder, latents, tokens, generator)

        pipeline = new_flow_pipeline(new_vae(), text_encoder, tokenizer, transformer)
        modules = {"transformer": transformer, "text_encoder": text_encoder}
        training.train(args, modules, pipeline, examples, tokens[0], loss_of, begin=lambda: None)
        return tmp_path / name

    return train


def test_what_is_written_draws_in_stock_diffusers(run):
    pipeline = DiffusionPipeline.from_pretrained(run("short", steps=2) / "pipeline")
    assert isinstance(pipeline, ZImagePipeline) and isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    assert {module.dtype for module in modules} == {torch.float32}
    images = pipeline(["red apple", "cat"], height=64, width=64, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()


def test_bundled_flow_pipeline_draws_on_white():
    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "pipeline-flow")
    pipeline.set_progress_bar_config(disable=True)
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
