"""Open images to make thumbnails, and to find damaged files and duplicates.

Each image is opened as the trainer opens it, when the page needs it. The result is cached until the file changes.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reslora.content_hash import content_mark
from reslora.images.data.images import damage, data_uri, open_image
from reslora.images.experiment.split import features_of, groups_of

from .image_folders import Image, Images
from .runs import RunError, stamp_of

SIDE = 256
"""Maximum width and height of a thumbnail in pixels."""
THREADS = 4
LARGEST = 1024
"""Maximum width and height of an enlarged image in pixels."""
AT_ONCE = 32
"""Number of images opened between two progress updates."""


@dataclass(frozen=True)
class Look:
    """The result of opening an image."""

    stamp: tuple[int, ...]
    """The result of `stamp_of` for the image's file when it was opened."""
    problem: str = ""
    """Why the image cannot be opened; empty if it can."""
    mark: str = ""
    """Hash of the image file's content."""
    seen: bytes = b""
    """Features by which an experiment's split finds near-duplicates, as the bytes of a float32 array."""
    thumbnail: str = ""
    """The image as a data URI, rotated according to EXIF, with white for transparency; empty if it cannot be opened."""


class Looks:
    """The results of opening images, cached by file."""

    def __init__(self) -> None:
        self.known: dict[Path, Look] = {}

    def of(self, image: Image) -> Look | None:
        """Return the cached result of an image, or None if the image was not opened or its file has changed since."""
        look = self.known.get(image.path)
        return look if look and look.stamp == stamp_of(image.path) else None

    def problem(self, image: Image) -> str:
        """Return the known reason why training skips an image, first that it is damaged; empty if there is none."""
        look = self.of(image)
        return (look.problem if look else "") or image.problem

    def enlarged(self, image: Image) -> list[tuple[str, str]]:
        """Return the image and, if it has one, its reference image: a title and a data URI of each.

        Raises `RunError` if one of them cannot be opened.
        """
        found = []
        for title, path in {"image": image.path, "reference image": image.reference}.items():
            if path is not None:
                try:
                    found.append((title, data_uri(open_image(path), LARGEST, quality=80)))
                except Exception as error:  # exceptions of damaged files differ by image format
                    raise RunError(f"{image.name}: its {title} cannot be shown ({damage(error)}).") from None
        return found

    def check(self, images: Sequence[Image]) -> Iterator[int]:
        """Open all images without a cached result; after every `AT_ONCE` images, yield the number of images done."""
        todo = [image for image in images if image.size and self.of(image) is None]
        done = len(images) - len(todo)
        yield done
        with ThreadPoolExecutor(THREADS) as pool:  # PIL decodes in parallel
            for start in range(0, len(todo), AT_ONCE):
                part = todo[start : start + AT_ONCE]
                self.known |= {image.path: look for image, look in zip(part, pool.map(look_at, part), strict=True)}
                yield done + start + len(part)

    def alike(self, images: Images) -> dict[str, tuple[str, str]]:
        """Return the duplicates and near-duplicates among a folder's images.

        The result has, by a duplicate's name, the name of the first image of its group, and a description of what it
        duplicates. It is empty until all images have been opened.
        """
        found = [(image, self.of(image)) for image in images.images.values() if image.size]
        if any(look is None for _, look in found):
            return {}
        sound = [(image.name, look) for image, look in found if not look.problem]
        return alike(tuple(sound))


def look_at(image: Image) -> Look:
    """Open an image."""
    stamp = stamp_of(image.path)
    try:
        opened = open_image(image.path)
        seen = features_of(opened).tobytes()
        return Look(stamp, "", content_mark(image.path), seen, data_uri(opened, SIDE, quality=80))
    except Exception as error:  # exceptions of damaged files differ by image format
        return Look(stamp, damage(error))


@functools.lru_cache(maxsize=8)
def alike(looks: tuple[tuple[str, Look], ...]) -> dict[str, tuple[str, str]]:
    """Return what `Looks.alike` returns, for names of images and the results of opening them.

    Images are in one group if an experiment's split treats them as duplicates.
    """
    if not looks:
        return {}
    names, marks = [name for name, _ in looks], [look.mark for _, look in looks]
    seen = np.stack([np.frombuffer(look.seen, dtype=np.float32) for _, look in looks])
    found = {}
    for group in groups_of(marks, seen):
        for number in group[1:]:
            same = next((other for other in group if other < number and marks[other] == marks[number]), None)
            line = f"looks like {names[group[0]]}" if same is None else f"the same image as {names[same]}"
            found[names[number]] = names[group[0]], line
    return found
