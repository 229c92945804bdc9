"""Aspect-ratio buckets: sizes of about the same area, and the choice of an image's bucket."""

import functools
from collections.abc import Sequence

from .size import Size

STEPS = 16  # the step between bucket edges is about a sixteenth of the resolution, see `step_of`
SMALLEST, LONGEST = 0.88, 2.6  # of a bucket: least area as a fraction of resolution**2, and highest aspect ratio


def step_of(resolution: int, multiple: int) -> int:
    """Return the number of pixels that bucket heights and widths are multiples of.

    The step is a sixteenth of the resolution, rounded down to a multiple of `multiple`, and at least `multiple`: the
    number of pixels that the model requires image height and width to be multiples of.
    """
    return max(multiple, resolution // STEPS // multiple * multiple)


@functools.cache
def ladder(resolution: int, multiple: int) -> tuple[Size, ...]:
    """Return all buckets of a resolution. No bucket has more pixels than a square with edges of `resolution`.

    At resolutions of 512 and more, cropping to the best bucket keeps at least 0.957 of an image's area if the image's
    aspect ratio is between 1:2 and 2:1 (tested).
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
    """Return the bucket that crops the least of an image (width and height); on a tie, the largest bucket."""
    return max(buckets, key=lambda size: (round(kept(image, size), 9), size.height * size.width))


def own_bucket(image: tuple[int, int], resolution: int, multiple: int) -> Size:
    """Return the size that an image (width and height) is cropped and scaled to if images are not upscaled.

    The size is the best of the buckets that are not wider or higher than the image. If there is none, it is the image's
    own size, rounded down to multiples of `step_of` and to the area of the square with edges of `resolution`. If an
    edge of the image is shorter than `step_of`, `multiple` replaces `step_of`. Only an image with an edge below
    `multiple` is upscaled.

    At resolutions of 512 and more, an image keeps at least 0.93 of its area if its aspect ratio is between 1:2 and 2:1
    and it has at least as many pixels as the square.
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
