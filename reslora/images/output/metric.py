"""Similarity between images, and between images and captions, measured by DINOv2 or CLIP."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ...errors import refused_as
from ..data.sources import Source

AT_ONCE = 16


class Metric:
    """Embeds images and captions as vectors of length 1, so that scalar products are cosine similarities."""

    def __init__(self, name: str, device: str) -> None:
        self.model = AutoModel.from_pretrained(name, use_safetensors=True).eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.reads_captions = hasattr(self.model, "get_text_features")
        self.tokenizer = AutoTokenizer.from_pretrained(name) if self.reads_captions else None
        self.seen: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the embeddings of images: images x features, float32 on the CPU."""
        found = []
        for start in range(0, len(images), AT_ONCE):
            rgb = [image.convert("RGB") for image in images[start : start + AT_ONCE]]
            inputs = self.processor(images=rgb, return_tensors="pt").to(self.model.device)
            embed = self.model.get_image_features if self.reads_captions else self.model
            found.append(unit(embed(**inputs)))
        return torch.cat(found)

    def of(self, sources: Sequence[Source], images: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the embeddings of data set images: images x features. An image is embedded only the first time.

        `images`: for each image, the index of its source, and the index of the image within this source.
        """
        marks = [sources[source].images.marks[number] for source, number in images]
        new = {mark: image for mark, image in zip(marks, images, strict=True) if mark not in self.seen}
        for start in range(0, len(new), AT_ONCE):
            some = list(new.items())[start : start + AT_ONCE]
            embedded = self.images([sources[source].images.open(number) for _, (source, number) in some])
            self.seen |= {mark: row for (mark, _), row in zip(some, embedded, strict=True)}
        return torch.stack([self.seen[mark] for mark in marks])

    @torch.no_grad()
    def captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of captions: captions x features; CLIP only."""
        assert self.tokenizer is not None
        inputs = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return unit(self.model.get_text_features(**inputs.to(self.model.device)))


def unit(output: Any) -> torch.Tensor:
    """Return a model's pooled output, or else its first token's output, normalized to length 1: items x features."""
    if not isinstance(output, torch.Tensor):
        pooled = getattr(output, "pooler_output", None)
        output = output.last_hidden_state[:, 0] if pooled is None else pooled
    return normalize(output.float(), dim=-1).cpu()


@functools.lru_cache(maxsize=1)
def load_metric(name: str, device: str) -> Metric:
    """Load the model once per process, and return its `Metric`.

    Raises `InvalidArgument` for a model without safetensors files, and for one that needs custom code.
    """
    fix = "give a folder or a name on the hub of DINOv2 or CLIP, with safetensors"
    with torch.random.fork_rng(devices=[]), refused_as(f"--metric_model {name}", fix):
        metric = Metric(name, device)
        metric.images([Image.new("RGB", (64, 64))])
        return metric
