"""Samples: what the pipeline is given."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipelines import FAMILIES

from reslora.diffusion.arguments import Flags
from reslora.diffusion.model.families import load_family
from reslora.diffusion.output.drawing import Drawer
from reslora.diffusion.seeds import derive

FLAGS = Flags(
    seed=0, num_inference_steps=1, guidance_scale=4.0, resolution=32, validation_height=None, validation_width=None
)


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_text_states_of_half_precision_are_drawn_in_the_pipelines_at_any_size(tmp_path, name):
    """As the export does: in float32 whatever the precision of training. Samples need not be squares."""
    folder = FAMILIES[name](tmp_path / "model")
    family = load_family(index_of(folder)["_class_name"])
    pipeline = family.pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        texts = {c: family.encode_captions(pipeline, [c], 8) for c in ("red disc", "")}
    texts = {c: {k: v[0].bfloat16() for k, v in states.items()} for c, states in texts.items()}
    for height, width in ((None, None), (40, 24), (None, 48)):
        flags = FLAGS.replace(train_batch_size=2, validation_height=height, validation_width=width)
        (drawn,) = Drawer(pipeline, family, texts, flags).draw(getattr(pipeline, family.denoiser), ["red disc"], 1)
        assert drawn.shape == (height or 32, width or 32, 3) and np.isfinite(drawn).all()


@pytest.mark.parametrize("name", ["qwen_image", "krea2"])
def test_samples_are_guided_by_the_scale_that_is_given(tmp_path, name):
    """By other arguments than Stable Diffusion's, and away from a caption of another length."""
    family = load_family(index_of(FAMILIES[name](tmp_path / "model"))["_class_name"])
    pipeline = family.pipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, family.denoiser)
    with torch.no_grad():
        texts = {c: {"states": family.encode_captions(pipeline, [c], 64)["states"][0]} for c in ("red disc box", "")}

    def drawn(scale: float) -> np.ndarray:
        flags = FLAGS.replace(train_batch_size=1, guidance_scale=scale, num_inference_steps=2)
        return Drawer(pipeline, family, texts, flags).draw(denoiser, ["red disc box"], 1)[0]

    given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", family.guidance: 9.0}
    seed = torch.Generator().manual_seed(derive(0, "sample", 0, 0))
    stock = pipeline("red disc box", negative_prompt="", generator=seed, **given).images[0]
    assert np.abs(drawn(9.0) - stock).max() < 1e-4 < np.abs(drawn(1.0) - stock).max()


class Recorder:
    """Stands for a pipeline: keeps the seeds that it is to draw from."""

    def __init__(self) -> None:
        self.seeds, self.unet = [], None
        self.vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)

    def __call__(self, generator: list[torch.Generator], **_):
        self.seeds += [one.initial_seed() for one in generator]
        return SimpleNamespace(images=np.zeros((len(generator), 2, 2, 3)))


def seeds_of(prompts: list[str], images: int, seed: int = 0, batch: int = 3) -> list[int]:
    flags = FLAGS.replace(seed=seed, train_batch_size=batch)
    family = SimpleNamespace(denoiser="unet", guidance="guidance_scale", drawing_inputs=lambda *_: {})
    pipeline = Recorder()
    drawn = Drawer(pipeline, family, defaultdict(dict), flags).draw(torch.nn.Identity(), prompts, images)
    assert len(drawn) == len(pipeline.seeds) == len(prompts) * images
    return pipeline.seeds


def test_every_image_of_every_prompt_has_a_seed_of_its_own_whatever_the_batch():
    seeds = seeds_of(["red", "blue"], 3)
    assert len(set(seeds)) == 6
    assert seeds == seeds_of(["red", "blue"], 3, batch=1) == seeds_of(["box", "disc"], 3)
    assert seeds[:3] == seeds_of(["red"], 3) and seeds[0] == seeds_of(["red"], 1)[0]
    assert not set(seeds) & set(seeds_of(["red", "blue"], 3, seed=1))
