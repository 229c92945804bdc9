"""List the folders of images that the page may show and train on: folders under the data folder, and uploads.

Folder names that come from a browser are only compared with the listed names, never used as paths.
"""

import os
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from reslora.bundled import ASSETS
from reslora.images.data.listing import TRASH
from reslora.images.settings import BUNDLED_IMAGES
from reslora.options.prompts import clean

from .bases import bundled
from .runs import Run, pick

UPLOADS, SETS = ".images", ".datasets"
"""Folders below the runs folder: for images that earlier versions stored to start a run, and for uploaded folders."""
BUNDLED = "bundled images"
IMAGES = {f"{ASSETS.name}/{BUNDLED_IMAGES.name}": BUNDLED_IMAGES}
"""Path of the bundled images, by the last two parts of the path; the other parts differ between machines."""


def free_name(place: Path, stem: str) -> str:
    """Return the first of STEM-1, STEM-2 ... that does not exist in a folder."""
    return next(name for n in count(1) if not (place / (name := f"{stem}-{n}")).exists())


@dataclass(frozen=True)
class Folder:
    """An image folder that the page may show and train on."""

    name: str
    path: Path
    bundled: bool = False

    def without_path(self, text: str) -> str:
        """Return a line of the trainer's output with the path of this folder removed."""
        inside = text.replace(f"{self.path}{os.sep}", "").replace(str(self.path), self.name)
        above = self.path.parent
        return inside if above == above.parent else inside.replace(str(above), "the folder above")


class Folders:
    """The list of image folders that the page may show and train on, read from disk at each call."""

    def __init__(self, runs: Path, data: Path | None = None) -> None:
        self.runs, self.data = runs, data and data.resolve()

    def all(self) -> dict[str, Folder]:
        """Return the folders by name; the bundled images are last."""
        found = [(".", self.data)] if self.data else []
        found += [(path.name, path) for path in children(self.data)]
        for prefix, name in (("uploads", SETS), ("runs", UPLOADS)):
            found += [(f"{prefix}/{path.name}", path) for path in children((self.runs / name).resolve())]
        folders = {name: Folder(name, path) for name, path in found}
        return folders | {BUNDLED: Folder(BUNDLED, BUNDLED_IMAGES.resolve(), bundled=True)}

    def find(self, name: object) -> Folder:
        """Return the folder with this name. Raises `RunError` if no folder on the list has the name."""
        return pick(self.all(), name, "There is no such folder of images; choose one from the list.")

    def of_run(self, run: Run) -> str:
        """Return the name that selects a run's image folder in the form; empty for the bundled images.

        If the folder is not on the list, the result is a name for which `find` raises `RunError`.
        """
        named = [*run.words("dataset_name"), *run.words("train_data_dir")]
        if not named or (len(named) == 1 and bundled(named[0], IMAGES)):
            return ""
        paths = [Path(clean(name)).resolve() for name in named]
        found = (name for name, folder in self.all().items() if [folder.path.resolve()] == paths)
        return next(found, f"images of {run.name} (not on the list)")


def new_place(folder: Path) -> Path:
    """Return a new path in a folder's trash; its name is the current time."""
    return folder / TRASH / f"{datetime.now():%Y%m%d-%H%M%S-%f}"


def children(folder: Path | None) -> list[Path]:
    """Return the visible subfolders that are not links and whose names are valid UTF-8, which a browser can show."""
    try:
        found = sorted(folder.iterdir()) if folder else []
    except OSError:
        return []
    return [path for path in found if path.name[0] != "." and clean(path.name) == path.name
            and path.is_dir() and not path.is_symlink()]  # fmt: skip
