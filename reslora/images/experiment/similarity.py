"""Similarities of a chosen run's samples by --metric_model: cosine similarities of embeddings."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ...experiment.study import COMPARING
from ...methods.adapters import without_adapters
from ..generators import derive
from ..output.metric import load_metric
from ..output.sampling import Sampler, as_image
from ..prompts import UNRELATED
from ..study import ImageStudy as Setting
from .split import Image

MEANINGS = {
    "image_similarity": ("To test images", "samples of the test captions, compared with the test images"),
    "caption_similarity": ("To captions", "the same samples, compared with the captions"),
    "nearest_training": (
        "Nearest training image",
        "the same samples, each compared with the most similar training image; 1 is a copy",
    ),
    "unrelated_similarity": ("Base kept", "samples of unrelated prompts, compared with those of the base model"),
    "diversity": ("Diversity", "mean distance (1 - similarity) between samples of one prompt"),
}
"""Title in the report and description of each similarity."""

MOST_TEST, MOST_TRAINING, DRAWINGS = 16, 512, 4


def similarities(parts: Mapping[str, nn.Module], images: Sequence[Image], setting: Setting) -> dict[str, float]:
    """Return the similarities listed in `MEANINGS`; the similarity to captions needs CLIP.

    The samples are generated from UNRELATED prompts and from the captions of the first MOST_TEST test images, with the
    reference images of these test images if there are any.
    """
    context, sources = setting.context, setting.training_data.sources
    metric = load_metric(context.options.validation.metric_model, str(context.accelerator.device))
    denoiser = next(iter(parts.values()))

    def sampled_features(prompts: Sequence[str], count: int = 1, sampler: Sampler = setting.sampler) -> torch.Tensor:
        """Generate `count` images of each prompt, and return their features: images x features."""
        drawn = sampler.draw(denoiser, prompts, count, lambda: context.stop.check(COMPARING))
        return metric.images([as_image(image) for image in drawn])

    tested, of_tested = images[:MOST_TEST], setting.sampler
    if sources[0].images.paired:
        pairs = [(sources[source].images, number) for source, number in tested]
        references = [(found.marks[number], found.open_references(number)) for found, number in pairs]
        of_tested = dataclasses.replace(setting.sampler, references=references)
    captions = [
        sources[source].transform.plain(sources[source].images.captions[number][0]) for source, number in tested
    ]
    drawn, again = sampled_features(captions, 1, of_tested), sampled_features(captions[:1], DRAWINGS, of_tested)
    kept = sampled_features(UNRELATED)
    with without_adapters(*parts.values()):
        base = sampled_features(UNRELATED)
    apart = 1 - again @ again.T
    found = {"image_similarity": (drawn * metric.of(sources, tested)).sum(1).mean()}
    if metric.reads_captions:
        found["caption_similarity"] = (drawn * metric.captions(captions)).sum(1).mean()
    if trained := training_images(setting):  # unknown in a comparison of files
        found["nearest_training"] = (drawn @ metric.of(sources, trained).T).amax(1).mean()
    found["unrelated_similarity"] = (kept * base).sum(1).mean()
    found["diversity"] = apart.sum() / (DRAWINGS * (DRAWINGS - 1))
    return {name: float(value) for name, value in found.items()}


def training_images(setting: Setting) -> list[Image]:
    """Return at most MOST_TRAINING training images; a hash of the content determines which."""
    sources = setting.training_data.sources
    marks = {
        (number, image): source.images.marks[image]
        for number, source in enumerate(sources)
        if not source.images.of_class
        for image in source.train
    }
    return sorted(marks, key=lambda image: derive("nearest", marks[image]))[:MOST_TRAINING]
