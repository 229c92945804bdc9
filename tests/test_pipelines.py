"""The builders of tests/pipelines.py make pipelines that stock diffusers loads and samples from."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from pipelines import FAMILIES, sd3


def draw(folder, **parts) -> np.ndarray:
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompt="red disc", height=32, width=32, num_inference_steps=2, output_type="np").images
    return np.asarray(images[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_and_draws(family, tmp_path):
    image = draw(FAMILIES[family](tmp_path / family))
    assert image.shape == (32, 32, 3) and np.isfinite(image).all() and image.std() > 0


def test_stable_diffusion_3_draws_without_t5(tmp_path):
    folder = sd3(tmp_path / "sd3", with_t5=False)
    assert np.isfinite(draw(folder, text_encoder_3=None, tokenizer_3=None)).all()


@pytest.mark.exhaustive
def test_overrides_reach_the_parts(tmp_path):
    folder = FAMILIES["stable_diffusion"](
        tmp_path / "sd", unet={"layers_per_block": 2}, scheduler={"prediction_type": "epsilon"}
    )
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert pipeline.unet.config.layers_per_block == 2
    assert pipeline.scheduler.config.prediction_type == "epsilon"
