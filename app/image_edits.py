"""Edit a folder of images: change one or many captions, move images to the trash, and undo these changes."""

import contextlib
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

from reslora.errors import first_line
from reslora.formatting import pluralize
from reslora.images.data.caption_files import caption_files
from reslora.images.data.captions import SEPARATOR
from reslora.io import replacing
from reslora.options.prompts import clean

from .caption_files import BETWEEN, Captions, with_captions, with_rows
from .folders import new_place
from .image_folders import Image, Images, read
from .jobs import Jobs
from .looks import Looks
from .runs import RunError

REPLACE, BEFORE, AFTER, ADD_TAG, REMOVE_TAG = "Replace", "Put before", "Put after", "Add tag", "Remove tag"
EVERYTHING, LEFT_OUT, WITHOUT_CAPTION, ALIKE = "All images", "Skipped by training", "Without caption", "Duplicates"
Files = Mapping[Path, bytes | None]
"""New contents of files; None for a file to remove."""
Change = tuple[str, dict[Path, bytes | Path | None], Files]
"""Description of a change, the files before it (a path in the trash for a removed one), and the files after it."""
FILTERS = (EVERYTHING, LEFT_OUT, WITHOUT_CAPTION, ALIKE)


def with_tag(caption: str, tag: str, _: str) -> str:
    """Return the caption with the tags in `tag` appended that it does not have."""
    tags = tags_of(caption)
    return f"{SEPARATOR} ".join([*filter(None, [caption]), *(one for one in tags_of(tag) if one not in tags)])


def without_tag(caption: str, tag: str, _: str) -> str:
    """Return the caption without the tags in `tag`; a caption without these tags is unchanged."""
    tags, others = tags_of(caption), tags_of(tag)
    kept = [one for one in tags if one not in others]
    return f"{SEPARATOR} ".join(kept) if kept != tags else caption


def tags_of(caption: str) -> list[str]:
    """Return the tags of a caption, split as the trainer splits them."""
    return [tag.strip() for tag in caption.split(SEPARATOR) if tag.strip()]


OPERATIONS: dict[str, Callable[[str, str, str], str]] = {
    REPLACE: str.replace,
    BEFORE: lambda caption, text, _: text + caption,
    AFTER: lambda caption, text, _: caption + text,
    ADD_TAG: with_tag,
    REMOVE_TAG: without_tag,
}


def put(path: Path, content: bytes) -> None:
    """Replace a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def content_of(path: Path) -> bytes | None:
    """Return the content of a file, or None if it does not exist."""
    return path.read_bytes() if path.is_file() else None


def restore(before: Mapping[Path, bytes | Path | None]) -> None:
    """Restore files that were written or removed: their content, their place in the trash, or None for a new file."""
    for path, content in before.items():
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            put(path, content)
        else:
            content.rename(path)
            with contextlib.suppress(OSError):  # it has other files
                os.removedirs(content.parent)


class ImageEdits:
    """Edit and undo changes of the image folders that the page may show."""

    def __init__(self, jobs: Jobs) -> None:
        self.folders, self.jobs, self.looks = jobs.images, jobs, Looks()
        self.last: dict[Path, Change] = {}
        """The last change of each folder, which can be undone."""
        self.lock = threading.Lock()

    def look(self, name: object) -> Images:
        """Return the images of the folder with this name."""
        return read(self.folders.find(name))

    def shown(self, images: Images, which: str, words: str = "") -> list[Image]:
        """Return the images that the filter `which` selects and whose name or caption contains `words`."""
        alike, found = self.looks.alike(images), list(images.images.values())
        if which == LEFT_OUT:
            found = [image for image in found if self.looks.problem(image)]
        elif which == WITHOUT_CAPTION:
            found = [image for image in found if not image.captions or not all(image.captions)]
        elif which == ALIKE:
            firsts = {first for first, _ in alike.values()}
            found = [image for image in found if image.name in alike or image.name in firsts]
            found.sort(key=lambda image: (alike.get(image.name, (image.name, ""))[0], image.name in alike))
        words = words.casefold()
        return [image for image in found if words in image.name.casefold() or words in text_of(image).casefold()]

    # -- changes -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self, folder: object) -> Iterator[Images]:
        """Yield the images of a folder while no other change is made. Raises `RunError` if the images cannot be
        changed.
        """
        with self.lock:
            images = self.look(folder)
            if images.folder.bundled:
                raise RunError(
                    "The bundled images cannot be changed; upload a folder, or start the application with --data."
                )
            if images.fixed:
                raise RunError(f"Captions cannot be changed here: {images.fixed}.")
            try:
                yield images
            except OSError as error:
                raise RunError(f"Nothing was changed: {error.strerror or first_line(error)}.") from None

    def write(self, images: Images, line: str, files: Files) -> None:
        """Replace files, and move files without new content to the trash; if one of the changes fails, make none of
        them.
        """
        before, trash, folder = {}, new_place(images.folder.path), images.folder.path
        try:
            for path, content in files.items():
                was: bytes | Path | None = content_of(path)
                if content is None:
                    was = trash / path.relative_to(folder)
                    was.parent.mkdir(parents=True, exist_ok=True)
                    path.rename(was)
                else:
                    put(path, content)
                before[path] = was
        except OSError:
            restore(before)
            raise
        self.last[folder] = line, before, files

    def write_captions(self, images: Images, captions: Captions, line: str) -> None:
        """Write captions; `line` describes the change."""
        self.write(images, line, with_captions(images, captions))

    def save_caption(self, folder: str, name: str, was: str, text: str) -> str:
        """Write `text` as the caption of one image, and return the caption as stored.

        Raises `RunError` if the current caption is not `was`, the caption that the user saw.
        """
        with self.changing(folder) as images:
            (image,) = images.find([name])
            now = text_of(image)
            if now != was:
                raise RunError(f"{name} was changed in the meantime; nothing was written. Its caption is now {now!r}")
            text = clean(text).strip()
            captions = [part.strip() for part in text.split(BETWEEN) if part.strip()] if image.captions[1:] else [text]
            self.write_captions(images, {name: captions}, f"the caption of {name}")
        return BETWEEN.join(captions)

    def change_captions(self, folder: str, names: list[str], operation: str, text: str, other: str = "") -> str:
        """Change the captions of the named images, and return a sentence that reports it.

        `operation`: Replace (`text` by `other`), Put before, Put after, Add tag or Remove tag."""
        if not text.strip():
            raise RunError("No words to use: enter words or a tag first.")
        with self.changing(folder) as images:
            found: dict[str, list[str]] = {}
            for image in images.find(names):
                captions = [OPERATIONS[operation](caption, text, other).strip() for caption in image.captions or ("",)]
                if captions != list(image.captions or ("",)):
                    found[image.name] = captions
            if not found:
                return "No caption had to be changed."
            line = f"{operation.lower()}, {pluralize(len(found), 'caption')}"
            self.write_captions(images, found, line)
        return f"Changed: {line}."

    def throw_away(self, folder: str, names: list[str]) -> str:
        """Move the named images to the folder's trash, and return a sentence that reports it.

        The images' caption files, masks and reference images are also moved, unless a remaining image uses them. The
        images' rows in a metadata table are removed.
        """
        with self.changing(folder) as images:
            if run := self.jobs.reader(images.folder.path):
                raise RunError(f"{run.name} is training, maybe on these images; wait until it ends, or stop it first.")
            chosen = {image.name: image for image in images.find(names)}
            files: dict[Path, bytes | None] = {}  # tables first, so that no row names a missing image
            for table in {image.table for image in chosen.values() if image.table}:
                files[table] = with_rows(table, {}, [image for image in chosen.values() if image.table == table])
            line = f"{pluralize(len(chosen), 'image')} moved to the trash"
            self.write(images, line, files | dict.fromkeys(files_of_only(chosen, images)))
        return f"{line[0].upper()}{line[1:]} (.trash in the folder, which training ignores)."

    def undo(self, folder: str) -> str:
        """Undo the last change of a folder, and return a sentence that reports it.

        Raises `RunError` if one of the changed files was changed again later.
        """
        with self.changing(folder) as images:
            if (change := self.last.pop(images.folder.path, None)) is None:
                return "There is nothing to undo."
            line, before, after = change
            for path, content in after.items():
                if content_of(path) != content:
                    raise RunError(
                        f"{path.name} was changed later: nothing was restored; .trash has the earlier files."
                    )
            restore(before)
        return f"Undone: {line}."


def files_of_only(names: Container[str], images: Images) -> list[Path]:
    """Return the existing files, with caption files, that are used by images with these names and by no other image."""
    files: tuple[list[Path], list[Path]] = [], []
    for name, image in images.images.items():
        files[name in names].extend((*image.files, *caption_files(image.path)))
    others, chosen = files
    return [path for path in dict.fromkeys(chosen) if path not in others and path.is_file()]


def text_of(image: Image) -> str:
    """Return all captions of an image as one text, joined by `BETWEEN`, with the line ends of an HTML text box."""
    return BETWEEN.join(image.captions).replace("\r\n", "\n").replace("\r", "\n")
