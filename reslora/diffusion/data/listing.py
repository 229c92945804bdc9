"""What is in a folder of images: hidden files and folders, as editors and desktops keep copies in, are not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...files import all_below
from ...options.images import DataOptions, OutputOptions
from ...words import are, counted
from .images import is_image

TRASH = ".trash"  # the application's own hidden folder


def files_of(folder: Path, data: DataOptions, output: OutputOptions, deep: bool = True) -> list[Path]:
    """All that is in a folder but for what is hidden, the class images, and what this very run writes: its samples.

    A folder inside the run's own, or inside that of the class images, was named, and is read. With `deep`, also what is
    in its folders.
    """
    there = all_below(folder) if deep else folder.iterdir()
    everything = [path for path in sorted(there) if not path.name.startswith(".")]
    root = folder.resolve()
    others = [place for name in (output.output_dir, data.class_data_dir) if name for place in _places(Path(name))]
    inside = [other.relative_to(root) for other in others if root in other.parents]
    return [path for path in everything if not any(path.relative_to(folder).is_relative_to(other) for other in inside)]


def _places(folder: Path) -> tuple[Path, Path]:
    """Where a folder is, however it is written; of one that is a link, also where that is."""
    return folder.resolve(), folder.parent.resolve() / folder.name


def hidden_images(folder: Path) -> list[Path]:
    """Hidden images of a folder, and those in its hidden folders but the trash: whoever has filled that knows of it."""
    found = []
    for place, _, names in os.walk(folder):
        parts = Path(place).parts[len(folder.parts) :]
        if TRASH not in parts:
            hidden = any(part.startswith(".") for part in parts)
            found += [Path(place, name) for name in names if (hidden or name.startswith(".")) and is_image(Path(name))]
    return sorted(found)


def told_of_hidden(images: Sequence[Path]) -> list[str]:
    """A line about images that are hidden; none where there are none."""
    told = f"{counted(len(images), 'hidden image')} {are(len(images))} not read"
    return [f"{told} (for example {images[0]})"] if images else []
