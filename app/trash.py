"""Images out of the way of training, and back: moved, with captions and masks, to where the trainer passes them over.

What is thrown away together has a folder of its own in `.trash`, and a record of the rows that it had in a table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from reslora.diffusion.data.dataset import caption_files
from reslora.diffusion.data.listing import TRASH
from reslora.diffusion.data.tables import ROWS
from reslora.files import read_object, remove, write_json

from .caption_files import WRITING, Table, readable
from .folders import new_place
from .image_folders import Image, Images
from .runs import RunError

RECORD = "trash.json"


def throw_away(images: Images, thrown: Sequence[Image]) -> Path:
    """Moves images, captions, masks and rows to the trash, all of them or with `RunError` none; returns where they are.

    An image that is listed twice goes with both of its rows, a caption file or mask with the last image that reads it.
    """
    paths = {os.path.normpath(image.path) for image in thrown}
    chosen = [image for image in images.images.values() if os.path.normpath(image.path) in paths]
    root = images.folder.path
    with WRITING, readable():
        tables = {path: Table.read(path, images) for path in {image.metadata for image in chosen if image.metadata}}
        rows = {path: table.take(image.name for image in chosen) for path, table in tables.items()}
        files = [path.relative_to(root).as_posix() for path in files_with(chosen, images)]
        record = {"files": files, "rows": {str(path.relative_to(root)): taken for path, taken in rows.items()}}
        place = new_place(root)
        write_json(place / RECORD, record)
        try:
            for table in tables.values():  # first, so that no row names an image that is gone
                table.write()
            move(files, root, place)
        except BaseException:
            put_back(images, place)
            raise
    return place


def files_with(chosen: Sequence[Image], images: Images) -> list[Path]:
    """The files of images that are there, and the masks and caption files that no other image reads."""
    paths = dict.fromkeys(image.path for image in chosen)
    others = [image for image in images.images.values() if image.path not in paths]
    stems = {image.path.with_suffix("") for image in others}
    captions = [text for path in paths if path.with_suffix("") not in stems for text in caption_files(path)]
    used = {path for image in others for path in (image.path, image.mask)}
    masks = [image.mask for image in chosen if image.mask is not None and image.mask not in used]
    return [path for path in dict.fromkeys([*paths, *captions, *masks]) if path.is_file()]


def move(files: Sequence[str], source: Path, target: Path) -> None:
    """Moves those of the files that are there, and that are not in the new place."""
    for name in files:
        if (source / name).is_file() and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(target / name)


def thrown_away(root: Path) -> list[Path]:
    """What is in the trash of a folder, the newest first."""
    found = sorted((root / TRASH).glob(f"*/{RECORD}"), reverse=True) if (root / TRASH).is_dir() else []
    return [path.parent for path in found]


def count(place: Path) -> int:
    """How many files were thrown away together."""
    return len(record_of(place)[0])


def record_of(place: Path) -> tuple[list[str], dict[str, list[tuple[int, str]]]]:
    """The files that were thrown away together, and the rows by table; nothing that leads elsewhere."""
    record = read_object(place / RECORD)
    files, rows = record.get("files"), record.get("rows")
    files = [name for name in files if is_inside(name)] if isinstance(files, list) else []
    tables = {name: own for name, own in rows.items() if is_inside(name)} if isinstance(rows, dict) else {}
    return files, {name: own for name, own in tables.items() if Path(name).suffix in ROWS and isinstance(own, list)}


def is_inside(name: object) -> bool:
    """Whether a name is that of a file in the folder."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def put_back(images: Images, place: Path) -> None:
    """Puts what was thrown away together where it was; `RunError` where there are others."""
    root = images.folder.path
    files, rows = record_of(place)
    with WRITING, readable():
        if there := [name for name in files if (root / name).exists() and (place / name).exists()]:
            raise RunError(f"{there[0]} is there again: move it away first. Nothing was put back.")
        tables = {name: Table.read(root / name, images) for name in rows}
        move(files, place, root)
        try:
            for name, table in tables.items():
                if missing := [(where, text) for where, text in rows[name] if text not in table.pieces]:
                    for where, text in missing:
                        table.insert(where, text)
                    table.write()
        except BaseException:
            move(files, root, place)
            raise
        remove(place)
