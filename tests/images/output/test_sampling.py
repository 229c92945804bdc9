"""Samples: the arguments of the pipeline."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pipelines import FAMILIES

from reslora.images.generators import derive
from reslora.images.model.families import load_family
from reslora.images.output.sampling import Sampler
from reslora.images.prompts import Prompt, resolved
from reslora.options.images import Options

FLAGS = Options.of(
    seed=0, num_inference_steps=1, guidance_scale=4.0, resolution=32, validation_height=None, validation_width=None
)


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model_index.json").read_text())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["sdxl", "qwen_image"])
def test_text_states_of_half_precision_are_drawn_in_the_pipelines_at_any_size(tmp_path, name):
    """As for exports: in float32, whatever the precision of training. Samples need not be square."""
    folder = FAMILIES[name](tmp_path / "model")
    family = load_family(index_of(folder)["_class_name"])
    pipeline = family.pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        texts = {c: family.encode_captions(pipeline, [c], 8) for c in ("red disc", "")}
    texts = {c: {k: v[0].bfloat16() for k, v in states.items()} for c, states in texts.items()}
    for height, width in ((None, None), (40, 24), (None, 48)):
        flags = FLAGS.replace(train_batch_size=2, validation_height=height, validation_width=width)
        (drawn,) = Sampler(pipeline, family, texts, flags.data, flags.training, flags.validation).draw(
            getattr(pipeline, family.denoiser), ["red disc"], 1
        )
        assert drawn.shape == (height or 32, width or 32, 3) and np.isfinite(drawn).all()


@pytest.mark.parametrize("name", ["qwen_image", "krea2", "lumina2"])
def test_samples_are_guided_by_the_scale_that_is_given(tmp_path, name):
    """With other arguments than Stable Diffusion's, and a negative prompt of another length."""
    family = load_family(index_of(FAMILIES[name](tmp_path / "model"))["_class_name"])
    pipeline = family.pipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, family.denoiser)
    with torch.no_grad():
        texts = {c: {"states": family.encode_captions(pipeline, [c], 64)["states"][0]} for c in ("red disc box", "")}

    def drawn(scale: float) -> np.ndarray:
        flags = FLAGS.replace(train_batch_size=1, guidance_scale=scale, num_inference_steps=2)
        return Sampler(pipeline, family, texts, flags.data, flags.training, flags.validation).draw(
            denoiser, ["red disc box"], 1
        )[0]

    given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", family.guidance: 9.0}
    seed = torch.Generator().manual_seed(derive(0, "sample", 0, 0))
    stock = pipeline("red disc box", negative_prompt="", generator=seed, **given).images[0]
    assert np.abs(drawn(9.0) - stock).max() < 1e-4 < np.abs(drawn(1.0) - stock).max()


class Recorder:
    """A stand-in for a pipeline that records the seeds and the arguments of each batch."""

    def __init__(self) -> None:
        self.seeds, self.unet, self.batches = [], None, []
        self.vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)

    def __call__(self, generator: list[torch.Generator], **how):
        self.batches.append((len(generator), how))
        self.seeds += [one.initial_seed() for one in generator]
        return SimpleNamespace(images=np.zeros((len(generator), 2, 2, 3)))


def family_of(sampling_inputs=lambda *_: {}, told: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        denoiser="unet", guidance="guidance_scale", sampling_inputs=sampling_inputs, takes_guidance=told, unguided=1.0,
        batches_references=True,
    )  # fmt: skip


def seeds_of(prompts: list, images: int, seed: int = 0, batch: int = 3) -> list[int]:
    flags = FLAGS.replace(seed=seed, train_batch_size=batch)
    family, texts, pipeline = family_of(), defaultdict(dict), Recorder()
    drawn = Sampler(pipeline, family, texts, flags.data, flags.training, flags.validation).draw(
        torch.nn.Identity(), prompts, images
    )
    assert len(drawn) == len(pipeline.seeds) == len(prompts) * images
    return pipeline.seeds


def test_every_image_of_every_prompt_has_a_seed_of_its_own_whatever_the_batch():
    seeds = seeds_of(["red", "blue"], 3)
    assert len(set(seeds)) == 6
    assert seeds == seeds_of(["red", "blue"], 3, batch=1) == seeds_of(["box", "disc"], 3)
    assert seeds[:3] == seeds_of(["red"], 3) and seeds[0] == seeds_of(["red"], 1)[0]
    assert not set(seeds) & set(seeds_of(["red", "blue"], 3, seed=1))


def test_prompts_are_drawn_by_their_own_options_and_together_where_these_are_alike():
    said = []
    texts = {text: {"states": torch.tensor([float(ord(text[0]))])} for text in ("a", "b", "c", "d", "n")} | {"": {}}

    def sampling_inputs(pipeline, text, negative, empty):
        said.append(([chr(int(value)) for value in text["states"]], len(negative), empty))
        return {}

    prompts = [
        Prompt("a"),
        Prompt("b"),
        Prompt("c", "n", 48, 24, num_inference_steps=3, cfg_scale=2.0, guidance_scale=9),
    ]
    prompts.append(Prompt("d", cfg_scale=1.0))
    for told, scales in ((False, [4.0, 2.0, 1.0]), (True, [4.0, 9, 4.0])):
        pipeline = Recorder()
        flags = FLAGS.replace(train_batch_size=8)
        Sampler(pipeline, family_of(sampling_inputs, told), texts, flags.data, flags.training, flags.validation).draw(
            torch.nn.Identity(), prompts, 1
        )
        found = [(count, how["width"], how["height"], how["num_inference_steps"]) for count, how in pipeline.batches]
        assert found == [(2, 32, 32, 1), (1, 48, 24, 3), (1, 32, 32, 1)]
        assert [how["guidance_scale"] for _, how in pipeline.batches] == scales
    assert said[:3] == [(["a", "b"], 0, True), (["c"], 1, False), (["d"], 0, True)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["stable_diffusion", "chroma"])
def test_a_negative_prompt_changes_what_every_family_with_guidance_draws(tmp_path, name):
    folder = FAMILIES[name](tmp_path / "model")
    family = load_family(json.loads((folder / "model_index.json").read_text())["_class_name"])
    pipeline = family.pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    # Captions that nobody has encoded: the pipeline's own encoders are there.
    flags = FLAGS.replace(train_batch_size=2, max_sequence_length=64)
    sampler = Sampler(pipeline, family, {}, flags.data, flags.training, flags.validation)
    prompts = [Prompt("red disc", seed=1), Prompt("red disc", "blue box", seed=1)]
    plain, negative = sampler.draw(getattr(pipeline, family.denoiser), prompts, 1)
    assert np.abs(plain - negative).max() > 1e-4
    # A scale of 1 is none to kohya, whatever the pipeline's own counts from.
    plain, negative = (dataclasses.replace(prompt, cfg_scale=1.0) for prompt in prompts)
    assert np.array_equal(*sampler.draw(getattr(pipeline, family.denoiser), [plain, negative], 1))


@pytest.mark.parametrize(("pipeline", "scale"), [("ZImagePipeline", 6.5), ("Krea2Pipeline", 6.5), ("FluxPipeline", 4)])
def test_kohyas_scale_as_the_pipeline_counts_it(pipeline, scale):
    """`positive + g (positive - negative)` is a scale of 1 + g."""
    assert (
        resolved(Prompt("a", cfg_scale=7.5), FLAGS.data, FLAGS.validation, load_family(pipeline)).guidance_scale
        == scale
    )
    assert (
        resolved(
            Prompt("a", cfg_scale=7.5), FLAGS.data, FLAGS.validation, load_family("StableDiffusionPipeline")
        ).guidance_scale
        == 7.5
    )
