"""Aspect-ratio buckets: sizes of about the same area, and the choice of an image's bucket."""

import functools
from collections.abc import Sequence

from .size import Size

STEPS = 16  # the edges of buckets are multiples of a sixteenth of the resolution, or of less
SMALLEST, LONGEST = 0.88, 2.6  # least area as a fraction of the square's, and highest aspect ratio


def step_of(resolution: int, multiple: int) -> int:
    """Return the step of bucket edges in pixels: a sixteenth of the resolution, rounded to the model's multiple."""
    return max(multiple, resolution // STEPS // multiple * multiple)


@functools.cache
def ladder(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Return the buckets for images that are large enough: their area is at most that of the square of `resolution`.

    From a resolution of 512 on, an image with an aspect ratio from 1:2 to 2:1 keeps at least 0.957 of its area
    (tested).
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
    """Return the buckets of --aspect_ratio_buckets, written `height,width;height,width`."""
    return [Size(*map(int, pair.split(","))) for pair in text.split(";") if pair]


def kept(image: tuple[int, int], size: Size) -> float:
    """Return the fraction of an image (width and height) that is left after cropping it to a size's aspect ratio."""
    ratio = image[0] / image[1] / (size.width / size.height)
    return min(ratio, 1 / ratio)


def bucket_of(image: tuple[int, int], buckets: Sequence[Size]) -> Size:
    """Return the bucket that crops least of an image (width and height); of several, the largest."""
    return max(buckets, key=lambda size: (round(kept(image, size), 9), size.height * size.width))


def own_bucket(image: tuple[int, int], resolution: int, multiple: int) -> Size:
    """Return the bucket of an image (width and height) that needs no upscaling: the best that fits into the image.

    If no bucket fits, the image's own size is rounded down to the grid and to the area of the square. If an edge is
    shorter than the grid's step, the size is rounded down to the model's multiple instead. Only an image smaller than
    that multiple is scaled up.

    From a resolution of 512 on, an image with an aspect ratio from 1:2 to 2:1 and at least as many pixels as the square
    keeps at least 0.93 of its area.
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
