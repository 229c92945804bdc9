"""Aspect-ratio buckets: sizes of about one area, and which of them an image is cropped and scaled to."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .size import Size

STEPS = 16  # of a square's side: sides of buckets are multiples of a sixteenth of it, or finer
SMALLEST, LONGEST = 0.88, 2.6  # share of the square's area, and longer side over shorter, of a bucket of ours


def step_of(resolution: int, multiple: int) -> int:
    """What the sides of buckets are multiples of: at most a sixteenth of the resolution, as far as the model allows."""
    return max(multiple, resolution // STEPS // multiple * multiple)


@functools.cache
def square(side: int) -> Size:
    """The square of a side, one object for all images."""
    return Size(side, side)


@functools.cache
def ladder(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Buckets for images that are no smaller, none larger in area than the square of `resolution`.

    From 512 on, an image of any shape from 1:2 to 2:1 keeps at least 0.957 of its area (a test says so).
    """
    step, area = step_of(resolution, multiple), resolution**2
    sides = range(step, 2 * resolution + 1, step)
    return tuple(
        Size(height, width)
        for height in sides
        for width in sides
        if SMALLEST * area <= height * width <= area and max(height, width) <= LONGEST * min(height, width)
    )


def named_buckets(text: str) -> list[Size]:
    """The buckets of --aspect_ratio_buckets, `height,width;height,width`."""
    return [Size(*map(int, pair.split(","))) for pair in text.split(";") if pair]


def kept(image: tuple[int, int], size: Size) -> float:
    """The share of an image (width and height) that is left once it is cropped to the shape of a size."""
    ratio = image[0] / image[1] / (size.width / size.height)
    return min(ratio, 1 / ratio)


def bucket_of(image: tuple[int, int], buckets: Sequence[Size]) -> Size:
    """The bucket that keeps most of an image (width and height); of several the largest."""
    return max(buckets, key=lambda size: (round(kept(image, size), 9), size.height * size.width))


def own_bucket(image: tuple[int, int], resolution: int, multiple: int) -> Size:
    """The bucket of an image (width and height) without scaling it up: one of the ladder that fits into it.

    Where none does, the image's own size is cut to the grid, and to the area of the square. With a side below the
    grid's step it is cut to what the model allows, and scaled up only where it is smaller than that.

    From 512 on, an image from 1:2 to 2:1 with as many pixels as the square keeps at least 0.93 of its area.
    """
    width, height = image
    fitting = [size for size in ladder(resolution, multiple) if size.width <= width and size.height <= height]
    if fitting:
        return bucket_of(image, fitting)
    step = step_of(resolution, multiple)
    step = step if min(image) >= step else multiple
    short, long = (max(step, side // step * step) for side in sorted(image))
    long = max(step, min(long, resolution**2 // short // step * step))
    return Size(short, long) if width >= height else Size(long, short)
