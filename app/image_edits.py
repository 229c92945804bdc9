"""Edit a folder of images: change one or many captions, move images to the trash, and undo these changes."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from reslora.formatting import pluralize
from reslora.images.data.caption_files import caption_files
from reslora.images.data.captions import SEPARATOR
from reslora.options.prompts import clean

from .caption_files import Edit, Table, write
from .changes import Change, changes, changing
from .folders import Folder
from .image_folders import Image, Images, options_of, read
from .jobs import Jobs
from .looks import Looks
from .runs import RunError, pick, stamp_of

BETWEEN = "\n\n"
"""Separator between the captions of an image in a text box, if the image has several captions."""
REPLACE, BEFORE, AFTER, ADD_TAG, REMOVE_TAG = "Replace", "Put before", "Put after", "Add tag", "Remove tag"
EVERYTHING, LEFT_OUT, NO_CAPTION, ALIKE = "All images", "Skipped by training", "Without caption", "Duplicates"
FILTERS = (EVERYTHING, LEFT_OUT, NO_CAPTION, ALIKE)


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


class ImageEdits:
    """Edit and undo changes of the image folders that the page may show."""

    def __init__(self, jobs: Jobs) -> None:
        self.folders, self.jobs, self.looks = jobs.images, jobs, Looks()
        self.refused: set[Path] = set()
        """Trash folders of changes that could not be undone. `undo` skips them, to reach earlier changes."""

    def look(self, name: object, settings: Sequence = ()) -> Images:
        """Return the images of the folder with this name.

        `settings`: resolution (text), whether aspect ratio buckets are used, and the name of the caption column."""
        return read(self.folders.find(name), options_of(*settings))

    def shown(self, images: Images, which: str, words: str = "") -> list[Image]:
        """Return the images that the filter `which` selects and whose name or caption contains `words`.

        Raises `RunError` for an unknown filter."""
        if which not in FILTERS:
            raise RunError(f"There is no such filter; choose one of: {', '.join(FILTERS)}.")
        alike, found = self.looks.alike(images), list(images.images.values())
        if which == LEFT_OUT:
            found = [image for image in found if self.looks.problem(image)]
        elif which == NO_CAPTION:
            found = [image for image in found if not image.captions or not all(image.captions)]
        elif which == ALIKE:
            firsts = {first for first, _ in alike.values()}
            found = [image for image in found if image.name in alike or image.name in firsts]
            found.sort(key=lambda image: (alike.get(image.name, (image.name, ""))[0], image.name in alike))
        words = str(words or "").casefold()
        return [image for image in found if words in image.name.casefold() or words in text_of(image).casefold()]

    def save_caption(self, images: Images, name: str, was: str, text: str) -> str:
        """Write `text` as the caption of one image, and return the caption as stored.

        Raises `RunError` if the current caption is not `was`, the caption that the user saw.
        """
        if not isinstance(was, str) or not isinstance(text, str):
            raise RunError("A caption is text; nothing was written.")
        (image,) = images.find([name])
        if in_box(text_of(image)) != in_box(was):
            raise RunError(
                f"{name} was changed in the meantime; nothing was written. Its caption is now {text_of(image)!r}"
            )
        several = len(image.captions or ()) > 1
        if several and any(BETWEEN in in_box(caption) for caption in image.captions or ()):
            raise RunError(f"A caption of {name} has an empty line, which separates its captions here: edit the table.")
        captions = tuple(clean(part).strip() for part in (text.split(BETWEEN) if several else [text]))
        captions = tuple(filter(None, captions)) if several else captions
        refuse_bundled(images.folder)
        write(images, [Edit(name, image.captions, captions)], f"the caption of {name}")
        return BETWEEN.join(captions)

    def change_captions(self, images: Images, names: object, operation: object, text: str, other: str = "") -> str:
        """Apply an operation to the captions of several images, and return a sentence that reports the change.

        `operation`: a key of `OPERATIONS`. `text` and `other`: the operation's arguments."""
        change = pick(OPERATIONS, operation, f"Choose one of: {', '.join(OPERATIONS)}.")
        text, other = str(text or ""), str(other or "")
        if not text.strip():
            raise RunError("No words to use: enter words or a tag first.")
        edits = []
        for image in images.find(names):
            before = image.captions or ("",)
            captions = tuple(change(caption, text, other).strip() for caption in before)
            if captions != before:
                edits.append(Edit(image.name, image.captions, captions))
        if not edits:
            return "No caption had to be changed."
        line = f"{operation.lower()}, {pluralize(len(edits), 'caption')}"
        refuse_bundled(images.folder)
        write(images, edits, line)
        return f"Changed: {line}."

    def throw_away(self, images: Images, names: object) -> str:
        """Move images to the folder's trash, and return a sentence that reports the change.

        Their caption files, masks and reference images are also moved, unless a remaining image uses them. All their
        rows in a metadata table are removed.
        """
        refuse_bundled(images.folder)
        if run := self.jobs.reader(images.folder.path):
            raise RunError(f"{run.name} is training, maybe on these images; wait until it ends, or stop it first.")
        picked = images.find(names)
        paths = {os.path.normpath(image.path) for image in picked}
        chosen = [image for image in images.images.values() if os.path.normpath(image.path) in paths]
        line = f"{pluralize(len(picked), 'image')} moved to the trash"
        with changing(images.folder, line) as draft:
            for metadata in {image.metadata for image in chosen if image.metadata}:
                table = Table(metadata, images)
                table.drop({image.name for image in chosen})
                table.put(draft)  # first, so that no row names a missing image
            for path in files_with(chosen, images):
                draft.put(path, stamp_of(path), None)
        return f"{line[0].upper()}{line[1:]} (.trash in the folder, which training ignores)."

    def last(self, folder: Folder) -> Change | None:
        """Return the change that `undo` reverts: the folder's last change that is not in `refused`.

        If all changes are in `refused`, return the last change; if there are no changes, return None.
        """
        found = (change for change in changes(folder) if change.place not in self.refused)
        return next(found, None) or next(changes(folder), None)

    def undo(self, images: Images, name: str | None = None) -> str:
        """Revert the last change of a folder, and return a sentence that reports it.

        `name`: name of the change that the user wants to revert. Raises `RunError` if the last change is another one,
        or if one of its files was changed later.
        """
        refuse_bundled(images.folder)
        change = self.last(images.folder)
        if change is None:
            return "There is nothing to undo."
        if name not in (None, change.place.name):
            raise RunError(f"Nothing was undone, because the last change is now another one: {change.line}.")
        try:
            change.restore()
        except RunError:
            self.refused.add(change.place)
            raise
        return f"Undone: {change.line}."

    def check(self, images: Images) -> Iterator[int]:
        """Open every image to find damaged images and duplicates; yield the number of images opened so far."""
        return self.looks.check(list(images.images.values()))


def files_with(chosen: Sequence[Image], images: Images) -> list[Path]:
    """Return the files of the images in `chosen`, and the other images and caption files that only these images use."""
    paths = dict.fromkeys(image.path for image in chosen)
    others = [image for image in images.images.values() if image.path not in paths]
    stems = {image.path.with_suffix("") for image in others}
    captions = [text for path in paths if path.with_suffix("") not in stems for text in caption_files(path)]
    used = {path for image in others for path in image.files}
    further = [path for image in chosen for path in image.files if path not in used]
    return [path for path in dict.fromkeys([*paths, *captions, *further]) if path.is_file()]


def text_of(image: Image) -> str:
    """Return all captions of an image as one text, joined by `BETWEEN`."""
    return BETWEEN.join(image.captions or ())


def in_box(text: str) -> str:
    """Return a text with line feeds as line ends, as an HTML text box has them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def refuse_bundled(folder: Folder) -> None:
    """Raise `RunError` for the bundled images, which must not change."""
    if folder.bundled:
        raise RunError("The bundled images cannot be changed; upload a folder, or start the application with --data.")
