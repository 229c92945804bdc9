"""Read image folders for the page with the trainer's own code, which decides which images it skips, and why."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from pathlib import Path

from reslora.errors import InvalidArgument
from reslora.images.data.dataset import METADATA, Found, read_folder
from reslora.images.data.folders import kohyas_folders
from reslora.images.data.images import image_size, is_image
from reslora.images.data.listing import files_of
from reslora.images.data.tables import REFERENCE
from reslora.images.settings import with_defaults
from reslora.options.images import Options
from reslora.options.prompts import clean

from .folders import Folder
from .launcher import trainers_parser
from .runs import RunError, cached_by, stamp_of

NO_CAPTION = "no caption"


@dataclass(frozen=True)
class Image:
    """An image as the trainer reads it."""

    name: str
    """Path of the file in the folder."""
    path: Path
    captions: tuple[str, ...] = ()
    """Captions used in training."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None if the file's header cannot be read."""
    problem: str = ""
    """Why training skips the image; empty if the image is used."""
    table: Path | None = None
    """The metadata table (.jsonl or .csv) of the image's folder; None if captions are in files next to the images."""
    row: int | None = None
    """Number of the image's row in the table; None if the table does not list the image."""
    mask: Path | None = None
    """The image's mask file, from the table's column `mask`."""
    reference: Path | None = None
    """The reference image for training an edit model, from the table's column `conditioning_image`."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of the image and, if it has them, of its mask and its reference image."""
        return tuple(filter(None, (self.path, self.mask, self.reference)))


@dataclass
class Images:
    """The images of a folder by name."""

    folder: Folder
    images: dict[str, Image] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    """Messages that the trainer would print about the folder."""
    refused: str = ""
    """Why training on the folder would not start; empty if it would start."""
    fixed: str = ""
    """Why captions cannot be edited, such as an unreadable table; empty if they can be edited."""

    def find(self, names: Collection[str]) -> list[Image]:
        """Return the images with these names. Raises `RunError` if `names` is empty or an image no longer exists."""
        if gone := [name for name in names if name not in self.images]:
            raise RunError(f"{gone[0][:80]} is no longer in this folder; reload the folder.")
        if not names:
            raise RunError("Select images first.")
        return [self.images[name] for name in names]

    def add(self, path: Path, **values) -> None:
        """Add an image under its path in the folder, as valid UTF-8."""
        name = clean(Path(os.path.relpath(path, self.folder.path)).as_posix())
        self.images[name] = Image(name, path, **values)


@functools.cache
def defaults() -> Options:
    """Return the trainer's default options for a folder of images."""
    return Options.of(**with_defaults(vars(trainers_parser().parse_args(["--train_data_dir", "images"]))))


def state_of(folder: Folder) -> Hashable:
    """Return a value that changes with any of a folder's files. Raises `RunError` if the images cannot be read."""
    try:
        return folder, hash(tuple((str(path), stamp_of(path)) for path in listed(folder)))
    except OSError:
        raise RunError("This folder cannot be read: check that it exists, then reload it.") from None


def listed(folder: Folder) -> list[Path]:
    """Return the visible files of a folder."""
    return files_of(folder.path, defaults().data, defaults().output)


@cached_by(state_of, 8)
def read(folder: Folder) -> Images:
    """Read all images of a folder as the trainer reads them, including the images that it skips."""
    result, table, why = Images(folder), None, NO_CAPTION
    try:
        parts, notes = kohyas_folders(folder.path, defaults().data, defaults().output)
        why = "not in one of kohya's folders" if parts else why
        for part, _, caption in parts or [(str(folder.path), 1, None)]:
            found = contents_of(Path(part), caption, deep=not parts)
            if found is None:
                line = "the datasets library reads this folder: it can be trained on, but is not shown here"
                return Images(folder, refused=line)
            add_found(result, found)
            notes += found.notes
            if found.metadata and not parts:
                table, why = found.metadata, f"not listed in {found.metadata.name}"
        result.notes = list(map(folder.without_path, notes))
    except (InvalidArgument, OSError) as error:
        has_table = any(path.name in METADATA for path in listed(folder))
        result = Images(folder, refused=told(folder, error), fixed=told(folder, error) if has_table else "")
    known = {os.path.normpath(path) for image in result.images.values() for path in image.files}
    for path in listed(folder):
        if is_image(path) and os.path.normpath(path) not in known:
            result.add(path, size=header_of(path), problem=why, table=table)
    return result


def contents_of(folder: Path, caption: str | None, deep: bool) -> Found | None:
    """Read a folder with its masks and reference images, or without those that are missing or invalid.

    Returns None if only the datasets library can read the folder. `caption`: caption of images without a caption file.
    `deep`: whether to read subfolders. Raises `InvalidArgument` if the folder cannot be read without its masks and
    reference images either.
    """
    options = defaults().replace(train_data_dir=str(folder))
    more = options.replace(masked_loss=True, conditioning_image_column=[REFERENCE])
    with contextlib.suppress(InvalidArgument):
        return read_folder(folder, more.data, more.training, options.output, caption, deep)
    return read_folder(folder, options.data, options.training, options.output, caption, deep)


def add_found(images: Images, found: Found) -> None:
    """Add the images that the trainer found."""
    for number, (path, row) in enumerate(zip(found.files, found.rows, strict=True)):
        mask, reference = row.pop("mask", None), row.pop(REFERENCE, None)  # only checked by training that uses them
        size = found.size(number, row)
        problem = size if isinstance(size, str) else ""
        images.add(
            path, captions=tuple(row["captions"]), size=header_of(path) if problem else size, problem=problem,
            table=found.metadata, row=None if found.metadata is None else number,
            mask=mask and Path(mask["path"]), reference=reference and Path(reference["path"]),
        )  # fmt: skip


def header_of(path: Path) -> tuple[int, int] | None:
    """Return width and height in pixels from an image's header, or None if the header cannot be read."""
    size = image_size(path)
    return None if isinstance(size, str) else size


def told(folder: Folder, error: Exception) -> str:
    """Return an error of the trainer without the command's option and without paths."""
    text = folder.without_path(str(error))
    return text.removeprefix(f"--train_data_dir {folder.name}").lstrip(",: ")
