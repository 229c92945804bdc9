"""List the files in a folder of images, without the hidden files and folders that editors and desktops create."""

from collections.abc import Sequence
from pathlib import Path

from ...formatting import is_or_are, pluralize
from ...io import all_below
from ...options.images import DataOptions, OutputOptions
from .images import is_image

TRASH = ".trash"  # the hidden folder into which the application moves deleted images


def files_of(folder: Path, data: DataOptions, output: OutputOptions, deep: bool = True) -> list[Path]:
    """Return the visible content of a folder, without the class images, reference images and this run's own output.

    If `folder` itself lies inside one of these folders, it is read nevertheless. With `deep`, subfolders are read too.
    """
    there = all_below(folder) if deep else folder.iterdir()
    everything = [path for path in sorted(there) if not path.name.startswith(".")]
    root = folder.resolve()
    names = (output.output_dir, data.class_data_dir, *data.conditioning_data_dir)
    others = [place for name in names if name for place in _places(Path(name))]
    inside = [other.relative_to(root) for other in others if root in other.parents]
    return [path for path in everything if not any(path.relative_to(folder).is_relative_to(other) for other in inside)]


def _places(folder: Path) -> tuple[Path, Path]:
    """Return the resolved path of a folder and, if it is a symbolic link, also the path of the link."""
    return folder.resolve(), folder.parent.resolve() / folder.name


def hidden_images(folder: Path) -> list[Path]:
    """Return hidden images of a folder, and images in its hidden folders, without those in the application's trash."""
    parts = {path: path.relative_to(folder).parts for path in folder.rglob("*") if is_image(path)}
    hidden = [path for path, names in parts.items() if any(name.startswith(".") for name in names)]
    return sorted(path for path in hidden if TRASH not in parts[path] and path.is_file())


def hidden_images_line(images: Sequence[Path]) -> list[str]:
    """Return a line about hidden images, or [] if there are none."""
    told = f"{pluralize(len(images), 'hidden image')} {is_or_are(len(images))} not read"
    return [f"{told} (for example {images[0]})"] if images else []
