"""Which images a forward reads: a function of the seed and the forward's number, and of nothing else.

So all methods read the same, a resumed run equals an uninterrupted one, and N processes share what one process with N
times the batch would read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..seeds import shuffled
from .size import Size
from .sources import Source


@dataclass(frozen=True)
class Draw:
    """One sample: an image of a source, at a size. The position seeds its noise, timestep, caption and crop."""

    source: int
    image: int
    size: Size
    position: int


class Plan:
    """The samples of every forward, of all processes together; all samples of a forward have one size.

    Each bucket (the images of one size) is an endless stream of rounds, every round a permutation of its own. An epoch
    is as many forwards of each bucket as hold one round, in a seeded order; what fills a bucket's last forward is the
    beginning of its next round. A bucket that is alone goes on behind what filled its last forward, so that its images
    are met equally often.
    """

    def __init__(self, sources: Sequence[Source], per_forward: int, seed: int) -> None:
        self.per_forward, self.seed = per_forward, seed
        self.buckets: dict[Size, list[tuple[int, int]]] = {}
        for number, source in enumerate(sources):
            for image in source.train:
                self.buckets.setdefault(source.size(image), []).extend([(number, image)] * source.repeats)
        self.sizes = list(self.buckets)
        self.order = functools.lru_cache(2 * len(self.sizes) + 2)(self._order)
        self.slots = functools.lru_cache(2)(self._slots)

    def forward(self, number: int) -> list[Draw]:
        """The samples of a forward."""
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
        """How many forwards meet every image."""
        return sum(self._forwards(size) for size in self.sizes)

    @functools.cached_property
    def met(self) -> dict[Size, float]:
        """How often an epoch meets the images of each bucket, to how often it should: its last forward is filled up."""
        return {size: self._forwards(size) * self.per_forward / len(items) for size, items in self.buckets.items()}

    def updates_per_epoch(self, accumulation: int) -> int:
        """How many updates, of `accumulation` forwards each, meet every image."""
        return max(1, math.ceil(self.forwards_per_epoch / accumulation))

    def _place(self, number: int) -> tuple[int, int, int]:
        """The bucket of a forward, its first place in the bucket's round, and the number of that round."""
        if len(self.sizes) == 1:
            return 0, number * self.per_forward, 0
        epoch, slot = divmod(number, self.forwards_per_epoch)
        bucket, ordinal = self.slots(epoch)[slot]
        return bucket, ordinal * self.per_forward, epoch

    def _slots(self, epoch: int) -> list[tuple[int, int]]:
        """The bucket of each forward of an epoch, and which of the bucket's forwards it is."""
        buckets = [bucket for bucket, size in enumerate(self.sizes) for _ in range(self._forwards(size))]
        seen, slots = [0] * len(self.sizes), []
        for place in self.order(len(buckets), -1, epoch):
            slots.append((buckets[place], seen[buckets[place]]))
            seen[buckets[place]] += 1
        return slots

    def _forwards(self, size: Size) -> int:
        return math.ceil(len(self.buckets[size]) / self.per_forward)

    def _order(self, length: int, bucket: int, round_: int) -> list[int]:
        """A permutation of a bucket in a round, or for bucket -1 of the forwards of an epoch."""
        which = () if bucket == 0 else (bucket,)
        return shuffled(length, self.seed, "order", *which, round_)
