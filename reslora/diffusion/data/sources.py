"""Where training images come from: one folder or dataset each, split, and put into buckets by size."""

from __future__ import annotations

from dataclasses import dataclass

from ..seeds import shuffled
from .captions import VERBATIM, Recipe
from .dataset import ImageDataset
from .encoding import Latents
from .size import Size


@dataclass(frozen=True)
class Source:
    """Images of one kind: those to be learnt, those that keep what is known, ..."""

    images: ImageDataset
    latents: Latents | None
    """None: images are encoded as they are drawn."""
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    """For the validation loss."""
    buckets: tuple[Size, ...]
    bucket: tuple[int, ...]
    """Of each image, which of the buckets."""
    weight: float = 1.0
    """Of the loss of its samples."""
    repeats: int = 1
    """How often an epoch meets each image."""
    recipe: Recipe = VERBATIM
    """What becomes of its captions: those of class images stay as they are."""

    def size(self, image: int) -> Size:
        """What an image is cropped and scaled to."""
        return self.buckets[self.bucket[image]]


def split(count: int, share: float, seed: int, least: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The images trained on, at least one, and the `share` of them held out for the validation loss.

    `least`: how many are held out at least.
    """
    order = shuffled(count, seed, "validation_split")
    held_out = min(max(least, round(share * count)), count - 1) if share else 0
    return tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out]))
