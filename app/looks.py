"""Open images to make pictures for the page, and to find damaged files and duplicates.

Each image is opened as the trainer opens it, when the page needs it. An opened image is cached until its file changes.
"""

import functools
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from reslora.content_hash import content_mark
from reslora.images.data.images import damage, open_image
from reslora.images.experiment.split import features_of, groups_of

from .image_folders import Image, Images
from .runs import stamp_of

THREADS = 4
LARGEST = 1024
"""Maximum width and height of a picture on the page in pixels."""


@dataclass(frozen=True)
class Look:
    """The result of opening an image."""

    problem: str = ""
    """Why the image cannot be opened; empty if it can."""
    mark: str = ""
    """Hash of the image file's content."""
    seen: bytes = b""
    """Features by which an experiment's split finds near-duplicates, as the bytes of a float32 array."""
    pictures: tuple[str, ...] = ()
    """Paths of copies for the page of the image and of its reference image, if it has one."""


class Looks:
    """The results of opening images, cached by file."""

    def __init__(self) -> None:
        self.known: dict[tuple[Path, tuple[int, ...]], Look] = {}
        self.pictures = tempfile.TemporaryDirectory(prefix="pictures-")

    def of(self, image: Image) -> Look | None:
        """Return the cached result of an image, or None if the image was not opened or its file has changed since."""
        return self.known.get(key_of(image))

    def problem(self, image: Image) -> str:
        """Return the known reason why training skips an image, first that it is damaged; empty if there is none."""
        look = self.of(image)
        return (look.problem if look else "") or image.problem

    def check(self, images: Sequence[Image]) -> Iterator[int]:
        """Open all images without a cached result; after each, yield the number of images done."""
        todo = [image for image in images if image.size and self.of(image) is None]
        with ThreadPoolExecutor(THREADS) as pool:  # PIL decodes in parallel
            opened = zip(todo, pool.map(self.open, todo), strict=True)
            for done, (image, look) in enumerate(opened, len(images) - len(todo) + 1):
                self.known[key_of(image)] = look
                yield done

    def open(self, image: Image) -> Look:
        """Open an image and its reference image, and save copies for the page."""
        try:
            opened = [open_image(path) for path in (image.path, image.reference) if path]
            seen = features_of(opened[0]).tobytes()
            return Look("", content_mark(image.path), seen, tuple(map(self.saved, opened)))
        except Exception as error:  # exceptions of damaged files differ by image format
            return Look(damage(error))

    def alike(self, images: Images) -> dict[str, tuple[str, str]]:
        """Return the duplicates and near-duplicates among a folder's images.

        The result maps the name of each duplicate to the name of its group's first image, and to a description of what
        it duplicates. The result is empty until all images have been opened.
        """
        found = [(image.name, self.of(image)) for image in images.images.values() if image.size]
        return {} if None in dict(found).values() else alike(tuple(found))

    def saved(self, opened: PIL.Image.Image) -> str:
        """Save an image, at most `LARGEST` pixels wide and high; return the path."""
        opened.thumbnail((LARGEST, LARGEST))
        path = Path(self.pictures.name, f"{uuid.uuid4().hex}.webp")
        opened.save(path, quality=85)
        return str(path)


def key_of(image: Image) -> tuple[Path, tuple[int, ...]]:
    """Return a key that changes with the image's file."""
    return image.path, stamp_of(image.path)


@functools.lru_cache(maxsize=8)
def alike(looks: tuple[tuple[str, Look], ...]) -> dict[str, tuple[str, str]]:
    """Return what `Looks.alike` returns, for names of images and the results of opening them.

    Images are in one group if an experiment's split treats them as duplicates.
    """
    sound = [(name, look) for name, look in looks if not look.problem]
    names, marks = [name for name, _ in sound], [look.mark for _, look in sound]
    seen = [np.frombuffer(look.seen, dtype=np.float32) for _, look in sound]
    found = {}
    for group in groups_of(marks, np.stack(seen)) if seen else ():
        for number in group[1:]:
            same = next((other for other in group if other < number and marks[other] == marks[number]), None)
            line = f"looks like {names[group[0]]}" if same is None else f"the same image as {names[same]}"
            found[names[number]] = names[group[0]], line
    return found
