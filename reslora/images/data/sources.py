"""The sources of training images: one folder or dataset each, split, and assigned to buckets by size."""

from dataclasses import dataclass

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
    """None if images are encoded in each step."""
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    """The numbers of the images that are held out for the validation loss."""
    sizes: tuple[Size, ...]
    """The size that each image is cropped and scaled to."""
    weight: float = 1.0
    """Factor that the loss of each sample is multiplied by."""
    repeats: int = 1
    """How often an epoch uses each image."""
    transform: CaptionTransform = VERBATIM
    """The transform of the captions; captions of class images are unchanged."""


def split(count: int, share: float, seed: int, least: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split `count` images at random; return the numbers of the training images and of the held-out images.

    `share` is the fraction to hold out for the validation loss. If it is not 0, at least `least` images are held out.
    At least one image remains for training in any case.
    """
    order = shuffled(count, seed, "validation_split")
    held_out = min(max(least, round(share * count)), count - 1) if share else 0
    return tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out]))
