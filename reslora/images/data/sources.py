"""The sources of training images: one folder or dataset each, split, and assigned to buckets by size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..generators import shuffled
from .captions import VERBATIM, CaptionTransform
from .dataset import ImageDataset
from .encoding import Latents
from .size import Size


@dataclass(frozen=True)
class Source:
    """Images with common options: training images or class images of one folder at one resolution."""

    images: ImageDataset
    latents: Latents | None
    """The encoded images; None if each step encodes its images."""
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    """Indices of the images that are held out for the validation loss."""
    sizes: tuple[Size, ...]
    """The size that each image is cropped and scaled to."""
    weight: float = 1.0
    """Factor that the loss of each sample is multiplied by."""
    repeats: int = 1
    """How often an epoch uses each image."""
    transform: CaptionTransform = VERBATIM
    """The transform of the captions; captions of class images are unchanged."""


def without_copies(sources: Sequence[Source]) -> tuple[tuple[Source, ...], int]:
    """Remove training images that are exact copies of held-out images; return the sources and the number of copies.

    A source that would have no image left keeps all its images.
    """
    held_out = {source.images.marks[image] for source in sources for image in source.held_out}
    if not held_out:
        return tuple(sources), 0
    found = [
        tuple(image for image in source.train if source.images.marks[image] not in held_out) or source.train
        for source in sources
    ]
    removed = sum(len(source.train) - len(train) for source, train in zip(sources, found, strict=True))
    return tuple(replace(source, train=train) for source, train in zip(sources, found, strict=True)), removed


def split(count: int, share: float, seed: int, least: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split `count` images at random; return the indices of the training images and of the held-out images.

    `share` is the fraction to hold out for the validation loss. If the fraction is not 0, at least `least` images are
    held out. At least one image remains for training in any case.
    """
    order = shuffled(count, seed, "validation_split")
    held_out = min(max(least, round(share * count)), count - 1) if share else 0
    return tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out]))
