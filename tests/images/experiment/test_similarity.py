"""Similarities of an arm's samples by hand: vectors stand for images, with and without adapters."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from experiment import examples
from peft import LoraConfig, get_peft_model

from reslora.experiment.report import arm_table
from reslora.images.data.captions import VERBATIM, CaptionTransform
from reslora.images.experiment import report_sections as pages
from reslora.images.experiment import similarity as drawn
from reslora.images.experiment.similarity import MEANINGS
from reslora.images.prompts import UNRELATED

ANGLES = {"a red disc": 0.0, "a blue disc": 90.0} | {prompt: 10.0 * number for number, prompt in enumerate(UNRELATED)}
"""At which the base model draws a prompt; an adapter turns by 20 degrees, and each further image by 30.

A test image is drawn with the words that are trained.
"""
IMAGES = (15.0, 80.0, 25.0, 200.0, 300.0)
"""Two to test with, two trained on, and a class image."""


def unit(angles) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])


class Metric:
    reads_captions = True

    def images(self, images):
        return unit([image.getpixel((0, 0))[0] + 0.0 for image in images])

    def of(self, sources, images):
        return unit([sources[source].images.angles[number] for source, number in images])

    def captions(self, captions):
        return unit([ANGLES[caption] + 40 for caption in captions])


class Sampler:
    def draw(self, denoiser, prompts, count, between_steps):
        turned = 0 if denoiser.base_model.model[0].disable_adapters else 20
        angles = [ANGLES[prompt] + turned + 30 * number for prompt in prompts for number in range(count)]
        return [np.full((2, 2, 3), angle / 255) for angle in angles]


def setting() -> SimpleNamespace:
    known = dict(captions=[["red"], ["blue"], ["red"], ["red"]], marks=["a", "b", "c", "d"])
    learnt = SimpleNamespace(angles=IMAGES[:4], of_class=False, paired=False, **known)
    of_class = SimpleNamespace(angles=IMAGES[4:], of_class=True, marks=["e"], captions=[["red"]])
    sources = (
        SimpleNamespace(
            images=learnt, train=(2, 3), transform=CaptionTransform(prefix="a", suffix="{disc|box}", wildcards=True)
        ),
        SimpleNamespace(images=of_class, train=(0,), transform=VERBATIM),
    )
    validation = SimpleNamespace(metric_model="any")
    context = SimpleNamespace(options=SimpleNamespace(validation=validation), accelerator=SimpleNamespace(device="cpu"))
    return SimpleNamespace(context=context, training_data=SimpleNamespace(sources=sources), sampler=Sampler())


def cos(*degrees: float) -> float:
    return sum(math.cos(math.radians(value)) for value in degrees) / len(degrees)


def test_by_hand(monkeypatch):
    monkeypatch.setattr(drawn, "load_metric", lambda *_: Metric())
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    found = drawn.similarities({"unet": model}, [(0, 0), (0, 1)], setting())
    assert list(found) == list(MEANINGS)
    assert found["image_similarity"] == pytest.approx(cos(20 - 15, 110 - 80))
    assert found["caption_similarity"] == pytest.approx(cos(20, 20))
    assert found["nearest_training"] == pytest.approx(cos(25 - 20, 110 - 25), abs=1e-6)
    assert found["unrelated_similarity"] == pytest.approx(cos(20))
    assert found["diversity"] == pytest.approx(1 - cos(30, 60, 90, 30, 60, 30))
    assert not model.base_model.model[0].disable_adapters


def test_the_report_has_a_column_for_each_that_was_measured():
    experiment = examples.experiment(None)
    assert "Base kept" not in arm_table(experiment, pages.IMAGES)
    arm = next(arm for arm in experiment["arms"] if arm["test"])
    arm["test"]["similarities"] = {"unrelated_similarity": 0.8765, "diversity": 0.25}
    table = arm_table(experiment, pages.IMAGES)
    assert "Base kept" in table and "Diversity" in table and "0.87650" in table and "To captions" not in table
