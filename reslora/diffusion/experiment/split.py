"""Which images are trained on, which choose rates and checkpoints, and which compare methods: a function of content.

An image and its near-duplicates (re-encoded, scaled, with another caption) are in one part. Which part, a hash of the
content says, whatever other images there are: an image that is added moves no other one but its duplicates. Only where
a part would be empty it takes the next in the order of the hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import PIL.Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...common.errors import InvalidArgument, refused_as
from ...experiment.parts import cut
from ..arguments import Flags
from ..data.class_images import balanced
from ..data.dataset import ImageDataset, data_flag
from ..data.samples import Material
from ..data.sources import Source

SIDE, MARGIN = 8, 8  # of the perceptual hash: cells across and down, and levels of 255 by which neighbours differ
NEAR = 16  # of its 384 bits, near-duplicates differ in at most so many
AT_ONCE = 1024  # rows of distances


Image = tuple[int, int]
"""Its source and its number there."""


@dataclass(frozen=True)
class Parts:
    """Images in the order of the hash; each content once but for those that are trained on."""

    train: tuple[Image, ...]
    select: tuple[Image, ...]
    test: tuple[Image, ...]
    duplicates: int
    """Contents that are where they are because of another one, as which they look."""

    def __str__(self) -> str:
        numbers = f"{len(self.train)} to train on, {len(self.select)} to choose by, {len(self.test)} to compare by"
        return f"images: {numbers}; {self.duplicates} near-duplicates, each beside the image that it repeats"


def parts_of(images: Mapping[int, ImageDataset], flags: Flags) -> Parts:
    """The images of these sources in three parts, by --select_split and --test_split, with at least one image in each.

    Raises `InvalidArgument` where there are fewer than three that are no near-duplicates.
    """
    flat = [(source, number) for source, found in images.items() for number in range(len(found))]
    marks = [images[source].marks[number] for source, number in flat]
    groups = groups_of(marks, perceptual_hashes(images, flat, data_flag(flags)))
    check_count(len(groups), flags)
    cuts = cut([min(marks[image] for image in group) for group in groups], flags.select_split, flags.test_split)
    train, select, test = ([image for number in numbers for image in groups[number]] for numbers in cuts)
    select, test = (list({marks[image]: image for image in reversed(part)}.values())[::-1] for part in (select, test))
    parts = [tuple(flat[image] for image in part) for part in (train, select, test)]
    return Parts(parts[0], parts[1], parts[2], duplicates=len(set(marks)) - len(groups))


def learnt(sources: Sequence[Source]) -> dict[int, ImageDataset]:
    """The images of all sources but class images, by their numbers."""
    return {number: source.images for number, source in enumerate(sources) if not source.images.of_class}


def check_count(images: int, flags: Flags) -> None:
    """Refuse so few images that some part would be empty."""
    if images < 3:
        problem = f"{images} images but for near-duplicates, to train on, to choose by and to compare by"
        raise InvalidArgument(data_flag(flags), problem, "give at least 3")


def with_parts(material: Material, parts: Parts) -> Material:
    """The material with the first part to train on and the second, up to --max_validation_images, held out."""
    held_out, learnt = parts.select[: material.flags.max_validation_images], []
    for number, source in enumerate(material.sources):
        if not source.images.of_class:
            own = [tuple(sorted(image for where, image in part if where == number)) for part in (parts.train, held_out)]
            repeats = source.images.repeats  # before those of all images were balanced with class images
            learnt.append(dataclasses.replace(source, train=own[0], held_out=own[1], repeats=repeats))
    of_class = [source for source in material.sources if source.images.of_class]
    of_class = [dataclasses.replace(source, repeats=source.images.repeats) for source in of_class]
    return dataclasses.replace(material, sources=balanced(learnt, of_class) if of_class else tuple(learnt))


def groups_of(marks: Sequence[str], hashes: np.ndarray) -> list[list[int]]:
    """The images, put together with their near-duplicates, and these with theirs.

    `marks`: the content of each; `hashes`: images x bits.
    """
    bits = hashes.astype(np.float32)
    weights, pairs = bits.sum(1), []
    for start in range(0, len(bits), AT_ONCE):
        part = bits[start : start + AT_ONCE]
        distances = weights[start : start + AT_ONCE, None] + weights - 2 * part @ bits.T
        found = np.argwhere(distances <= NEAR)
        found[:, 0] += start
        pairs.append(found)
    first = {mark: number for number, mark in reversed(list(enumerate(marks)))}
    same = [(number, first[mark]) for number, mark in enumerate(marks)]
    rows, columns = np.concatenate([*pairs, same]).T
    links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(bits), len(bits)))
    count, group = connected_components(links, directed=False)
    return [np.flatnonzero(group == number).tolist() for number in range(count)]


def perceptual_hashes(images: Mapping[int, ImageDataset], flat: Sequence[Image], flag: str) -> np.ndarray:
    """The hash of each image, images x bits; raises `InvalidArgument` for one that cannot be opened."""

    def hash_of(image: Image) -> np.ndarray:
        found, number = images[image[0]], image[1]
        with refused_as(f"{flag}, {found.name(number)}", "repair or remove it"):
            return perceptual_hash(found.open(number))

    with ThreadPoolExecutor() as pool:  # PIL decodes beside other threads
        return np.stack(list(pool.map(hash_of, flat)))


def perceptual_hash(image: PIL.Image.Image) -> np.ndarray:
    """Where each of 8 x 8 cells is clearly brighter than the one before it, across and down, in each colour (dHash).

    384 bits. Scaling and JPEG change a few of them; the margin keeps flat areas at zero.
    """
    bits = []
    for axis, size in ((1, (SIDE + 1, SIDE)), (0, (SIDE, SIDE + 1))):
        cells = np.asarray(image.resize(size, PIL.Image.Resampling.BOX), dtype=np.int16)
        bits.append((np.diff(cells, axis=axis) > MARGIN).ravel())
    return np.concatenate(bits)
