"""Store images and captions that a browser uploads as a new folder, under their own names."""

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reslora.formatting import pluralize
from reslora.images.data.caption_files import CAPTIONS, read_caption
from reslora.images.data.images import SUFFIXES, damage, image_size, is_image, open_image
from reslora.io import replacing
from reslora.options.prompts import clean

from .folders import SETS, Folder, Folders, free_name
from .runs import RunError, reporting

TABLES = ("metadata.jsonl", "metadata.csv")
FEW = 3
"""Number of files that an error names."""
THREADS = 4


def store(folders: Folders, name: str, files: Sequence[tuple[str, Path]]) -> tuple[Folder, list[str]]:
    """Store uploaded files as a new folder; return it, and the names of files that are not stored.

    `files`: the name and the uploaded copy of each. Images, their caption files and tables of captions are stored.
    `name`: the name of the folder; if empty, `images-1` or the next free number. Raises `RunError` for an invalid or
    existing name, for files that the trainer would skip, and if no file is an image.
    """
    place = folders.runs / SETS
    name = str(name or "").strip() or free_name(place, "images")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise RunError("A folder's name has letters, digits, hyphens and underscores, at most 64 of them.")
    if (place / name).exists():
        raise RunError("A folder with this name already exists; choose another name.")
    named = [(clean(Path(given).name), path) for given, path in files]
    images = {Path(given).stem for given, _ in named if is_image(Path(given)) and given[0] != "."}
    if not images:
        raise RunError(f"None of these files is an image: upload files of type {', '.join(sorted(SUFFIXES))}.")
    wanted = [
        (given, path) for given, path in named
        if given[0] != "." and (
            is_image(Path(given)) or given in TABLES
            or (Path(given).suffix.lower() in CAPTIONS and Path(given).stem in images)
        )
    ]  # fmt: skip
    with ThreadPoolExecutor(THREADS) as pool:  # PIL decodes in parallel
        problems = [f"{file[0]} ({why})" for file, why in zip(wanted, pool.map(problem_of, wanted), strict=True) if why]
    names = Counter(given for given, _ in wanted)
    problems += [f"{given} (several files have this name)" for given, number in names.items() if number > 1]
    if problems:
        more = f" and {pluralize(len(problems) - FEW, 'other file')}" if len(problems) > FEW else ""
        raise RunError(f"Nothing is stored. Correct these files or leave them out: {', '.join(problems[:FEW])}{more}.")
    with reporting("The images cannot be stored"), replacing(place / name) as temporary:
        temporary.mkdir()
        for given, path in wanted:
            shutil.copyfile(path, temporary / given)
    return folders.find(f"uploads/{name}"), sorted({given for given, _ in named} - names.keys())


def problem_of(file: tuple[str, Path]) -> str:
    """Return why an uploaded image or caption file cannot be used; empty if it can."""
    name, path = file
    if is_image(Path(name)):
        size = image_size(path)
        if isinstance(size, str):
            return size
        try:
            open_image(path)
        except Exception as error:  # exceptions of damaged files differ by image format
            return damage(error)
    text = read_caption(path) if Path(name).suffix.lower() in CAPTIONS else ""
    return text if isinstance(text, str) else ""
