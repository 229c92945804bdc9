"""Validate images and captions that a browser uploads, and copy them to folders."""

import contextlib
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from reslora.content_hash import content_mark
from reslora.images.data.caption_files import CAPTIONS, read_caption
from reslora.images.data.images import SUFFIXES, image_size
from reslora.io import remove_leftovers, replacing
from reslora.options.prompts import clean

from .runs import RunError

RECORD = ".uploaded"
"""Name of the file in a stored folder that contains a hash of the folder's contents when it was stored."""
MOST_IMAGES, MOST_BYTES = 2000, 1024 * 2**20
Contents = Mapping[str, Path | str]
"""Contents of a new folder by file name: the path of a file to copy, or the text of a caption file."""


def store_images(folder: Path, uploads: Sequence[str], caption: str) -> Path:
    """Copy uploaded images and captions to the new folder `folder`, and return its path.

    `caption`: the caption of images without a caption file; if empty, the words of the file name."""
    write(folder, contents_of(uploads, caption))
    return folder


def keep(folder: Path, uploads: Sequence[str], caption: str) -> Path:
    """Copy uploaded images and captions to the folder that `place_of` returns, and return this folder.

    Nothing is copied if the folder already has these contents."""
    contents = contents_of(uploads, caption)
    place = place_of(folder, contents)
    if not place.exists():
        remove_leftovers(place.parent)
        write(place, {**contents, RECORD: mark_of(contents)})
    return place


def place_of(folder: Path, contents: Contents) -> Path:
    """Return the folder for these contents: `folder`, or `folder-2` and so on if `folder` has other contents.

    The returned folder does not exist yet, or has exactly these contents. Raises `RunError` if these contents were
    stored before and the files in their folder were changed later.
    """
    mark = mark_of(contents)
    for number in itertools.count(1):
        place = folder.with_name(f"{folder.name}-{number}") if number > 1 else folder
        if not place.exists() or mark == mark_of(inside(place)):
            return place
        if (place / RECORD).is_file() and (place / RECORD).read_text(encoding="utf-8") == mark:
            what = f"These images were uploaded before, and runs/{place.name} was changed since"
            raise RunError(f"{what}: choose this folder and remove the uploads, or choose another name.")


def inside(folder: Path) -> Contents:
    """Return the current contents of a folder of uploads, including the folder's trash."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(folder).as_posix(): path for path in files}


def mark_of(contents: Contents) -> str:
    """Return a hash of the file names and contents of a folder."""
    marks = {name: content_mark(one.encode() if isinstance(one, str) else one) for name, one in contents.items()}
    return content_mark(repr(sorted(marks.items())).encode())


def contents_of(uploads: Sequence[str], caption: str) -> Contents:
    """Return the contents of a folder for the uploads; the files get new names.

    An image's caption is the uploaded caption file of the same name, else `caption`, else the words of the image's file
    name. Raises `RunError` for a file that the trainer would skip or refuse.
    """
    paths = [Path(upload) for upload in uploads]
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    texts = [path for path in paths if path.suffix.lower() in CAPTIONS]
    if not images:
        raise RunError(f"None of the uploaded files is an image: upload files of type {', '.join(sorted(SUFFIXES))}.")
    if len(images) > MOST_IMAGES or sum(path.stat().st_size for path in paths) > MOST_BYTES:
        raise RunError(f"The upload is too large: upload at most {MOST_IMAGES} images and {MOST_BYTES // 2**20} MB.")
    stems, beside = {path.stem for path in images}, {path.stem: path for path in texts}
    names = Counter(path.name for path in paths)  # files from several folders may have the same name
    for path in paths:
        if problem := problem_of(path, stems):
            raise RunError(f"{path.name[:80]} cannot be used ({problem}): remove it from the uploads, or correct it.")
        unclear = names[path.name] > 1 or (path in texts and beside[path.stem] != path)
        if unclear and path.stem in beside:
            raise RunError(f"Several files are named {path.stem[:80]}, so their captions are ambiguous: rename them.")
    found: dict[str, Path | str] = {}
    for number, path in enumerate(images):
        words = re.sub(r"[\W_]+", " ", path.stem).strip()
        text = beside.get(path.stem)
        found[f"{number:05d}{path.suffix.lower()}"] = path
        found[f"{number:05d}{text.suffix.lower() if text else '.txt'}"] = text or clean(caption or words).strip()
    return found


def problem_of(path: Path, stems: Collection[str]) -> str:
    """Return why an uploaded file cannot be used; empty if it can be used.

    `stems`: file names of the uploaded images, without suffix; a caption file must have one of these names.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        size = image_size(path)
        return size if isinstance(size, str) else ""
    if suffix not in CAPTIONS:
        return "neither an image nor a caption"
    if path.stem not in stems:
        return "a caption, but no image has its name"
    text = read_caption(path)
    return text if isinstance(text, str) else ""


def write(folder: Path, contents: Contents, linked: bool = False) -> None:
    """Write a new folder with these contents. Raises `RunError`, and leaves no folder, if a file cannot be written.

    `linked`: link the files, where the file system can, instead of copying them."""
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            for name, content in contents.items():
                if isinstance(content, str):
                    (temporary / name).write_bytes(content.encode())
                else:
                    copy(content, temporary / name, linked)
    except OSError as error:
        raise RunError(f"The images cannot be stored ({error.strerror}).") from None


def copy(source: Path, target: Path, linked: bool) -> None:
    """Copy a file or, with `linked`, link it if both are on a file system with links."""
    if linked:
        with contextlib.suppress(OSError):
            return os.link(source, target)
    shutil.copyfile(source, target)
