"""Read image folders for the page in the same way as the trainer.

The trainer's own code decides which images are skipped, and why. Images and caption files that are links to outside of
their folder are never shown.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reslora.errors import InvalidArgument
from reslora.images.data.dataset import METADATA, Found, caption_files, layout_of, read_folder
from reslora.images.data.folders import kohyas_folders
from reslora.images.data.images import SUFFIXES, image_size
from reslora.images.data.listing import files_of
from reslora.images.data.size import Size
from reslora.images.data.tables import REFERENCE
from reslora.images.data.training_data import size_of
from reslora.images.settings import with_defaults
from reslora.options.images import Options
from reslora.options.prompts import clean

from .folders import SETS, Folder, Folders
from .launcher import trainers_parser
from .library import kind_of
from .runs import RunError, cached_by, stamp_of
from .uploads import store_images

MULTIPLE = 8
"""Pixels of which bucket widths and heights are multiples. Models that need multiples of 16 have the same buckets at
resolutions of 256 and above."""
OUTSIDE = "leads out of the folder: not shown here"
ADDING = threading.Lock()
"""Lock to hold while an uploaded folder is stored, so that two uploads of the same name do not replace each other."""


@dataclass(frozen=True)
class Image:
    """An image as the trainer reads it."""

    name: str
    """Path of the file in the folder. If a table lists `a.png` twice, the second image is named `a.png (2)`."""
    path: Path
    captions: tuple[str, ...] | None
    """Captions used in training. Empty: the image's table row has no caption. None: the image has no table row, and no
    caption file with text."""
    size: tuple[int, int] | None
    """Width and height in pixels."""
    buckets: tuple[Size, ...] = ()
    """Sizes to which the image is resized and cropped, one for each training resolution."""
    problem: str = ""
    """Why training skips the image; empty if the image is used."""
    metadata: Path | None = None
    """The metadata table (.jsonl or .csv) that lists the image; None if the caption is in a file next to the image."""
    otherwise: str | None = None
    """Caption that training uses because the image has no caption file; None if there is no such default."""
    mask: Path | None = None
    """The image's mask file, from the image's table row; None if the row has no mask."""
    reference: Path | None = None
    """The reference image for training an edit model, from the table's column `conditioning_image`; None without it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The image, and its mask and its reference image if it has them."""
        return tuple(filter(None, (self.path, self.mask, self.reference)))


@dataclass(frozen=True)
class Images:
    """The images of a folder, and whether it can be trained on and edited."""

    folder: Folder
    options: Options
    images: dict[str, Image]
    notes: tuple[str, ...] = ()
    """Messages that the trainer would print about the folder."""
    refused: str = ""
    """Why training on the folder would not start; empty if it would start."""
    fixed: str = ""
    """Why captions cannot be edited, such as an unreadable table; empty if they can be edited."""

    def find(self, names: object) -> list[Image]:
        """Return the images with these names. Raises `RunError` if `names` is empty or an image no longer exists."""
        names = list(dict.fromkeys(map(str, names))) if isinstance(names, Iterable) else []
        if gone := [name for name in names if name not in self.images]:
            raise RunError(f"{gone[0][:80]} is no longer in this folder; reload the folder.")
        if not names:
            raise RunError("Select images first.")
        return [self.images[name] for name in names]


def add(folders: Folders, name: str, uploads: list[str], caption: str) -> Folder:
    """Store uploaded images as a new folder, and return it. Raises `RunError` for an invalid or existing name.

    `caption`: the caption of images without a caption file; if empty, the words of the file name."""
    name = name if isinstance(name, str) else ""
    if kind_of(folders.runs):
        raise RunError("This page shows a single run; start the application on a folder of runs to upload images.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise RunError("A folder's name has letters, digits, hyphens and underscores, at most 64 of them.")
    path = folders.runs / SETS / name
    with ADDING:
        if path.exists():
            raise RunError("A folder with this name already exists; choose another name.")
        store_images(path, uploads, caption)
    return folders.find(f"uploads/{name}")


@cached_by(lambda *given: repr(given), 64)
def options_of(resolution: object = "", buckets: object = False, column: object = "") -> Options:
    """Return the trainer's options for a resolution, use of aspect ratio buckets, and the caption column of tables.

    `resolution`: whole numbers with spaces between them. Raises `RunError` for an invalid setting.
    """
    sides = str(resolution or "").split()
    if not all(side.isdecimal() for side in sides):
        raise RunError("Give the resolution as whole numbers with spaces between them, such as 512 768.")
    words = ["--train_data_dir", "images", *(["--resolution", *sides] if sides else [])]
    words += ["--use_aspect_ratio_buckets"] if buckets is True else []
    words += [f"--caption_column={column}"] if column else []
    return Options.of(**with_defaults(vars(trainers_parser().parse_args(words))))


def state_of(folder: Folder, options: Options) -> Hashable:
    """Return a value that changes with any of a folder's files. Raises `RunError` if they cannot be read."""
    try:
        files = files_of(folder.path, options.data, options.output)
        return folder, repr(options), hash(tuple((str(path), stamp_of(path)) for path in files))
    except OSError:
        raise RunError("This folder cannot be read: check that it exists, then reload it.") from None


# -- as the trainer reads a folder -------------------------------------------------------------------------------------


@cached_by(state_of, 8)
def read(folder: Folder, options: Options) -> Images:
    """Read all images of a folder as the trainer reads them, including the images that it skips."""
    options = options.replace(train_data_dir=str(folder.path))
    images: dict[str, Image] = {}
    notes: list[str] = []
    refused, fixed, metadata, why = "", "", None, "no caption"
    try:
        parts, notes = kohyas_folders(folder.path, options.data, options.output)
        why = "not in one of kohya's folders" if parts else why
        for part, _, text in parts or [(str(folder.path), 1, None)]:
            found = with_other_images(Path(part), options.replace(train_data_dir=part), text, deep=not parts)
            if found is None:
                return Images(folder, options, {}, refused=whole_line(folder, options))
            notes += found.notes
            images |= images_of(found, folder, options, text)
            if found.metadata and not parts:
                metadata, why = found.metadata, f"not listed in {found.metadata.name}"
    except (InvalidArgument, OSError) as error:
        images, refused = {}, folder.without_path(str(error))
        fixed = (
            refused
            if any(path.name in METADATA for path in files_of(folder.path, options.data, options.output))
            else ""
        )
    images |= skipped_images(folder, options, images, why, metadata)
    if images and not refused and all(image.problem for image in images.values()):
        refused = "no image can be used"
    return Images(folder, options, images, tuple(map(folder.without_path, notes)), refused, fixed)


def with_other_images(folder: Path, options: Options, caption: str | None, deep: bool) -> Found | None:
    """Read a folder with its masks and reference images; leave out missing and invalid ones.

    Returns None for a folder that only the datasets library can read. `caption`: caption of images without a caption
    file. `deep`: whether to read subfolders.
    """
    for masked, column in itertools.product((True, False), (REFERENCE, None)):
        training = dataclasses.replace(options.training, masked_loss=masked)
        data = dataclasses.replace(options.data, conditioning_image_column=column)
        with contextlib.suppress(InvalidArgument):
            return read_folder(folder, data, training, options.output, caption, deep)
    return read_folder(folder, options.data, options.training, options.output, caption, deep)


def whole_line(folder: Folder, options: Options) -> str:
    """Return a sentence on why a folder that only the datasets library can read is not shown."""
    layout = layout_of(files_of(folder.path, options.data, options.output), folder.path) or "metadata in a folder below"
    return f"the datasets library reads this folder as a whole ({layout}): it can be trained on, but is not shown here"


def images_of(found: Found, folder: Folder, options: Options, otherwise: str | None) -> dict[str, Image]:
    """Return the images that the trainer found, by name.

    `otherwise`: the caption of images without a caption file.
    """
    names, images = names_of(found.files, folder.path), {}
    for index, (name, path, row) in enumerate(zip(names, found.files, found.rows, strict=True)):
        mask, reference = row.pop("mask", None), row.pop(REFERENCE, None)  # only checked by training that uses them
        usable = found.size(index, row)
        size, problem = (header_of(folder, path), usable) if isinstance(usable, str) else (usable, "")
        captions: tuple[str, ...] | None = tuple(row["captions"])
        if found.metadata is None and not captions:
            captions = None
        if leads_out(folder, path):
            captions, size, problem = None, None, OUTSIDE
        buckets = buckets_of(size, options) if size and not problem else ()
        images[name] = Image(
            name, path, captions, size, buckets, problem, found.metadata, otherwise, mask and Path(mask["path"]),
            reference and Path(reference["path"]),
        )  # fmt: skip
    return images


def skipped_images(
    folder: Folder, options: Options, read: dict[str, Image], why: str, metadata: Path | None
) -> dict[str, Image]:
    """Return the images in a folder that the trainer skips, by name; mask files and reference images are left out.

    `read`: the images that the trainer uses. `why`: the reason. `metadata`: the folder's table."""
    known = {os.path.normpath(path) for image in read.values() for path in image.files}
    paths = [
        path
        for path in files_of(folder.path, options.data, options.output)
        if path.suffix.lower() in SUFFIXES and os.path.normpath(path) not in known
    ]
    names = names_of([*(image.path for image in read.values()), *paths], folder.path)[len(read) :]
    return {
        name: Image(
            name, path, None, header_of(folder, path), (), OUTSIDE if leads_out(folder, path) else why, metadata
        )
        for name, path in zip(names, paths, strict=True)
    }


def leads_out(folder: Folder, path: Path) -> bool:
    """Return whether the image at `path`, or one of its caption files, is a link to outside of the folder."""
    return not all(map(folder.holds, [path, *caption_files(path)]))


def header_of(folder: Folder, path: Path) -> tuple[int, int] | None:
    """Return width and height in pixels from an image's header, or None if the header cannot be read."""
    size = image_size(path) if folder.holds(path) else ""
    return None if isinstance(size, str) else size


def buckets_of(size: tuple[int, int], options: Options) -> tuple[Size, ...]:
    """Return the sizes to which an image of this size is resized and cropped, one per training resolution."""
    return tuple(dict.fromkeys(size_of(size, side, MULTIPLE, options.data)[0] for side in options.data.resolution))


def names_of(paths: Sequence[Path], folder: Path) -> list[str]:
    """Return a name for each path: the path relative to `folder` as valid UTF-8; duplicates are numbered."""
    met: Counter[str] = Counter()
    names = []
    for path in paths:
        name = clean(Path(os.path.relpath(path, folder)).as_posix())
        met[name] += 1
        names.append(name if met[name] == 1 else f"{name} ({met[name]})")
    return names
