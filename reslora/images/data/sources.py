"""The sources of training images: one folder or dataset each, split, and assigned to buckets by size."""

from dataclasses import dataclass

from ..generators import shuffled
from .captions import VERBATIM, Recipe
from .dataset import ImageDataset
from .encoding import Latents
from .size import Size


@dataclass(frozen=True)
class Source:
    """Images with common options: the training images of a folder at a resolution, or class images."""

    images: ImageDataset
    latents: Latents | None
    """None if images are encoded in each step."""
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    """For the validation loss."""
    buckets: tuple[Size, ...]
    bucket: tuple[int, ...]
    """The index in `buckets` of each image."""
    weight: float = 1.0
    """Factor of the loss of these samples."""
    repeats: int = 1
    """How often an epoch uses each image."""
    recipe: Recipe = VERBATIM
    """The transform of its captions; those of class images are unchanged."""

    def size(self, image: int) -> Size:
        """Return the size that an image is cropped and scaled to."""
        return self.buckets[self.bucket[image]]


def split(count: int, share: float, seed: int, least: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the training images, at least one, and the fraction `share` that is held out for the validation loss.

    `least` is the lowest number of held-out images.
    """
    order = shuffled(count, seed, "validation_split")
    held_out = min(max(least, round(share * count)), count - 1) if share else 0
    return tuple(sorted(order[held_out:])), tuple(sorted(order[:held_out]))
