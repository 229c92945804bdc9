"""The order of the training images: it depends only on the data, the batch size, the seed and the batch's number.

Therefore all methods train on the same images in the same order, and a resumed run equals an uninterrupted one. N
processes together read the same batches as one process with N times the batch size.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..generators import shuffled
from .size import Size
from .sources import Source


@dataclass(frozen=True)
class Draw:
    """One sample of the run: index of its source, index of the image within the source, image size, and position.

    The position is the sample's number in the run. The position seeds the noise, timestep, caption and crop.
    """

    source: int
    image: int
    size: Size
    position: int


class Plan:
    """The samples of every batch. A batch covers all processes together, and all its samples have the same size.

    Each bucket (the images of one size) is an endless sequence of rounds. Every round is a new permutation of the
    images. An epoch reads one round of each bucket; a seeded permutation determines the order of the batches. If a
    round does not fill its last batch, the first images of the bucket's next round fill it up.

    With several buckets, the next epoch reads that next round from its first image, so that the images that filled up
    the batch are used again. With a single bucket, the next epoch continues after these images, so that all images are
    used equally often.
    """

    def __init__(self, sources: Sequence[Source], per_forward: int, seed: int) -> None:
        self.per_forward, self.seed = per_forward, seed
        self.buckets: dict[Size, list[tuple[int, int]]] = {}
        for number, source in enumerate(sources):
            for image in source.train:
                self.buckets.setdefault(source.sizes[image], []).extend([(number, image)] * source.repeats)
        self.sizes = list(self.buckets)
        self.order = functools.lru_cache(2 * len(self.sizes) + 2)(self._order)
        self.slots = functools.lru_cache(2)(self._slots)

    def forward(self, number: int) -> list[Draw]:
        """Return the samples of batch `number`."""
        bucket, first, round_ = self._place(number)
        size = self.sizes[bucket]
        items, draws = self.buckets[size], []
        for i in range(self.per_forward):
            further, place = divmod(first + i, len(items))
            source, image = items[self.order(len(items), bucket, round_ + further)[place]]
            draws.append(Draw(source, image, size, number * self.per_forward + i))
        return draws

    @functools.cached_property
    def forwards_per_epoch(self) -> int:
        """The number of batches per epoch, in which every image is used."""
        return sum(self._forwards(size) for size in self.sizes)

    @functools.cached_property
    def uses_per_epoch(self) -> dict[Size, float]:
        """How often an epoch uses each image of a size, divided by the image's repeats: one number per size.

        The number is 1, or higher if the last batch is filled up.
        """
        return {size: self._forwards(size) * self.per_forward / len(items) for size, items in self.buckets.items()}

    def updates_per_epoch(self, accumulation: int) -> int:
        """Return the number of optimizer updates per epoch, each of `accumulation` batches."""
        return max(1, math.ceil(self.forwards_per_epoch / accumulation))

    def _place(self, number: int) -> tuple[int, int, int]:
        """Return a batch's bucket, the position of its first sample in the bucket's round, and that round's number."""
        if len(self.sizes) == 1:
            return 0, number * self.per_forward, 0
        epoch, slot = divmod(number, self.forwards_per_epoch)
        bucket, ordinal = self.slots(epoch)[slot]
        return bucket, ordinal * self.per_forward, epoch

    def _slots(self, epoch: int) -> list[tuple[int, int]]:
        """Return the bucket of each batch of an epoch, and the batch's number among the bucket's batches."""
        buckets = [bucket for bucket, size in enumerate(self.sizes) for _ in range(self._forwards(size))]
        seen, slots = [0] * len(self.sizes), []
        for place in self.order(len(buckets), -1, epoch):
            slots.append((buckets[place], seen[buckets[place]]))
            seen[buckets[place]] += 1
        return slots

    def _forwards(self, size: Size) -> int:
        return math.ceil(len(self.buckets[size]) / self.per_forward)

    def _order(self, length: int, bucket: int, round_: int) -> list[int]:
        """Return the permutation of a bucket's images in a round; for bucket -1, of the batches in epoch `round_`."""
        which = () if bucket == 0 else (bucket,)
        return shuffled(length, self.seed, "order", *which, round_)
