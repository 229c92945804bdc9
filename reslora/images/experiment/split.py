"""Split images into training, selection and test parts as a function of their content.

An image and its near-duplicates (re-encoded, scaled, with another caption) are in the same part. The selection and test
parts contain only one image of such a group, so that copies do not count as independent images. Images of one session
or subject (a column `group`, or --test_groups folder) are in the same part, too. The part depends only on a hash of the
image's content: adding an image can only change the part of its near-duplicates, not of other images. Exceptions: an
empty part takes the next image in the order of the hash. A test part with a single image does so too if there are five
or more images.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.ExifTags
import PIL.Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ...errors import InvalidArgument, refused_as
from ...experiment.hashed_split import cut, enough_of
from ...formatting import pluralize
from ...options.images import DataOptions, ExperimentOptions, ValidationOptions
from ...seeds import derive
from ..data.class_images import balanced
from ..data.dataset import ImageDataset, data_flag
from ..data.samples import TrainingData
from ..data.sources import Source

SIDE, MARGIN = 8, 8  # perceptual hash: cells per row and column; least difference of neighboring cells, of 255
BITS, NEAR = 384, 16  # bits of the perceptual hash; largest number of bits in which near-duplicates differ
# On a plain background only few bits are set, so that even different images differ in few bits. Therefore the cells of
# near-duplicates must be similar, too: the squared norm of their difference is at most APART times the product of their
# norms. ROUNDING is a tolerance for each cell, of 255.
APART, ROUNDING = 0.15, 1.0
AT_ONCE = 1024  # rows of the distance matrix that are computed together


Image = tuple[int, int]
"""The number of a source, and the number of an image in that source."""


@dataclass(frozen=True)
class Parts:
    """The images of each part, in the order of their hashes.

    The selection and test parts have one image of each group of near-duplicates.
    """

    train: tuple[Image, ...]
    select: tuple[Image, ...]
    test: tuple[Image, ...]
    trained: int
    """Number of distinct training images: copies, and several resolutions of an image, count once."""
    duplicates: int
    """Number of near-duplicates, which are left out or are in the training part together with the original."""
    enough: float
    """The smallest --test_split that gives enough images, or groups, for a comparison."""
    groups: tuple[str, ...] = ()
    """Group of each image of the test part; empty if the images have no groups."""

    def __str__(self) -> str:
        held_out = f"{len(self.select)} in the selection split, {len(self.test)} in the test split"
        if self.groups:
            held_out += f" in {pluralize(len(set(self.groups)), 'group')}"
        more = f"{pluralize(self.duplicates, 'near-duplicate')}, none in another split than the original"
        return f"images: {self.trained} for training, {held_out}; {more}"


def parts_of(
    images: Mapping[int, ImageDataset], data: DataOptions, validation: ValidationOptions, experiment: ExperimentOptions
) -> Parts:
    """Split the images of these sources by --select_split and --test_split, with at least one image in each part.

    At most --max_validation_images of the selection part are used; its other images are not used at all. Raises
    `InvalidArgument` if there are fewer than three images without near-duplicates.
    """
    flat = [(source, number) for source, found in images.items() for number in range(len(found))]
    marks = [images[source].marks[number] for source, number in flat]
    groups = groups_of(marks, features_of_all(images, flat, data_flag(data)))
    named = ([images[flat[each][0]].name(flat[each][1]) for each in group[:2]] for group in groups if len(group) > 1)
    check_count(len(groups), data, next(named, []))
    names = names_of(images, flat, experiment.test_groups)
    units = joined(groups, names)
    check_count(len(units), data, named=bool(names))
    known = [min(marks[image] for group in unit for image in group) for unit in units]
    cuts = cut(known, experiment.select_split or 0, experiment.test_split or 0)
    train = [image for number in cuts[0] for group in units[number] for image in group]
    select, test = (
        [min(group, key=marks.__getitem__) for number in part for group in units[number]] for part in cuts[1:]
    )
    select = select[: validation.max_validation_images]
    of_test = tuple(names[units[number][0][0]] for number in cuts[2] for _ in units[number]) if names else ()
    parts = [tuple(flat[image] for image in part) for part in (train, select, test)]
    trained = len({marks[image] for image in train})
    duplicates = len(set(marks)) - len(groups)
    return Parts(parts[0], parts[1], parts[2], trained, duplicates, enough_of(known), of_test)


def names_of(images: Mapping[int, ImageDataset], flat: Sequence[Image], by: str | None) -> list[str]:
    """Return the name of each image's group: its folder with --test_groups folder; empty without groups.

    Raises `InvalidArgument` if the images are not files, or if only some sources have the column `group`.
    """
    if by:
        found = [Path(images[source].name(number)) for source, number in flat]
        if not all(path.is_file() for path in found):
            raise InvalidArgument(f"--test_groups {by}", "the images are not files", "give a column group instead")
        return [str(path.parent) for path in found]
    if not any(source.groups for source in images.values()):
        return []
    if not all(source.groups for source in images.values()):
        problem = "only some folders of images have a column group"
        raise InvalidArgument("--train_data_dir", problem, "add it to the metadata of the others, or remove it")
    return [images[source].groups[number] for source, number in flat]


def joined(groups: list[list[int]], names: Sequence[str]) -> list[list[list[int]]]:
    """Return the units of the split: groups of near-duplicates, joined if they have a common name."""
    if not names:
        return [[group] for group in groups]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names), len(groups))}
    links = [(number, numbers[names[image]]) for number, group in enumerate(groups) for image in group]
    rows, columns = np.array(links).T
    size = len(groups) + len(numbers)
    count, unit = connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(size, size)), False)
    return [[groups[place] for place in np.flatnonzero(unit[: len(groups)] == number)] for number in range(count)]


def order_of(images: Mapping[int, ImageDataset], chosen: Sequence[Image]) -> list[int]:
    """Return the indices of images in the order in which the images were taken: by EXIF time, or else by file name."""

    def key(image: Image) -> tuple:
        """Return an image's time, and its name with digits converted to numbers."""
        name, time = images[image[0]].name(image[1]), None
        if Path(name).is_file():
            with PIL.Image.open(name) as opened:
                time = opened.getexif().get(PIL.ExifTags.Base.DateTime)
        parts = re.split(r"(\d+)", name)
        return str(time or ""), [int(part) if part.isdecimal() else part for part in parts], parts

    keys = list(map(key, chosen))
    return sorted(range(len(chosen)), key=keys.__getitem__)


def content_of(parts: Parts, images: Mapping[int, ImageDataset]) -> str:
    """Return a hash of the images' content in each part; the order of the images does not matter."""
    found = (parts.train, parts.select, parts.test)
    marks: list = [sorted(images[source].marks[number] for source, number in part) for part in found]
    marks += [parts.groups] if parts.groups else []
    return f"{derive('parts', marks):016x}"


def training_images(sources: Sequence[Source]) -> dict[int, ImageDataset]:
    """Return the images of each source by the source's number, without class images."""
    return {number: source.images for number, source in enumerate(sources) if not source.images.of_class}


def check_count(images: int, options: DataOptions, alike: Sequence[str] = (), named: bool = False) -> None:
    """Raise `InvalidArgument` if a part would be empty.

    `alike`: names of two near-duplicates, as an example. `named`: whether `images` is a number of groups.
    """
    if images < 3 and named:
        problem = f"only {pluralize(images, 'group')} of images, and training, selection and test split need others"
        raise InvalidArgument(data_flag(options), problem, "give at least 3, better 30 or more")
    if images < 3:
        example = f" ({' and '.join(alike)} look alike)" if alike else ""
        number = f"only {pluralize(images, 'image')} without near-duplicates{example}"
        problem = f"{number}, and training, selection and test split need different images"
        raise InvalidArgument(data_flag(options), problem, "give at least 3, better 30 or more")


def with_parts(training_data: TrainingData, parts: Parts, processes: int) -> TrainingData:
    """Return the training data with the split: the training part to train on, the selection part held out."""
    own_images, of_class = [], []
    for number, source in enumerate(training_data.sources):
        source = dataclasses.replace(source, repeats=source.images.repeats)  # undo the balancing of class images
        if source.images.of_class:
            of_class.append(source)
        else:
            both = (parts.train, parts.select)
            own = [tuple(sorted(image for where, image in part if where == number)) for part in both]
            own_images.append(dataclasses.replace(source, train=own[0], held_out=own[1]))
    sources = (
        balanced(own_images, of_class, training_data.training.train_batch_size * processes)
        if of_class
        else tuple(own_images)
    )
    return dataclasses.replace(training_data, sources=sources)


def groups_of(marks: Sequence[str], looks: np.ndarray) -> list[list[int]]:
    """Return groups of near-duplicates (connected components), as lists of indices.

    `marks`: hashes of content; `looks`: images x features, from `features_of`.
    """
    (bits, cells), pairs = np.split(looks, [BITS], axis=1), []
    weights, squares = bits.sum(1), np.square(cells).sum(1)
    sizes = np.sqrt(squares)
    for start in range(0, len(bits), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        distances = weights[some, None] + weights - 2 * bits[some] @ bits.T
        apart = squares[some, None] + squares - 2 * cells[some] @ cells.T
        allowed = APART * (sizes[some, None] * sizes + ROUNDING**2 * cells.shape[1])
        found = np.argwhere((distances <= NEAR) & (apart <= allowed))
        found[:, 0] += start
        pairs.append(found)
    first = {mark: number for number, mark in reversed(list(enumerate(marks)))}
    same = [(number, first[mark]) for number, mark in enumerate(marks)]
    rows, columns = np.concatenate([*pairs, same]).T
    links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(bits), len(bits)))
    count, group = connected_components(links, directed=False)
    return [np.flatnonzero(group == number).tolist() for number in range(count)]


def features_of_all(images: Mapping[int, ImageDataset], flat: Sequence[Image], flag: str) -> np.ndarray:
    """Return the features of images, from `features_of`, for `groups_of`: images x features.

    Raises `InvalidArgument` if an image cannot be opened.
    """

    def features(image: Image) -> np.ndarray:
        """Return the features of one image."""
        found, number = images[image[0]], image[1]
        with refused_as(f"{flag}, {found.name(number)}", "repair or remove it"):
            return features_of(found.open(number))

    with ThreadPoolExecutor() as pool:  # PIL decodes without the GIL
        return np.stack(list(pool.map(features, flat)))


def features_of(image: PIL.Image.Image) -> np.ndarray:
    """Return the features of an image: a float32 vector of 384 and 192 values.

    The first 384 are the bits of the perceptual hash. The remaining features are 8 x 8 cells in each color, minus the
    color's mean.
    """
    cells = np.asarray(image.resize((SIDE, SIDE), PIL.Image.Resampling.BOX), dtype=np.float32)
    return np.concatenate([perceptual_hash(image).astype(np.float32), (cells - cells.mean((0, 1))).ravel()])


def perceptual_hash(image: PIL.Image.Image) -> np.ndarray:
    """Return a perceptual hash (dHash) of BITS bits: 8 x 8 cells, two directions and three colors.

    A bit is set if a cell is brighter than its left or upper neighbor by more than MARGIN, which keeps flat areas at
    zero. Scaling and JPEG compression change only a few bits.
    """
    bits = []
    for axis, size in ((1, (SIDE + 1, SIDE)), (0, (SIDE, SIDE + 1))):
        cells = np.asarray(image.resize(size, PIL.Image.Resampling.BOX), dtype=np.int16)
        bits.append((np.diff(cells, axis=axis) > MARGIN).ravel())
    return np.concatenate(bits)
