"""What a visitor does with a folder of images: change captions, one or many at once, throw images away, undo."""

from __future__ import annotations

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
from .image_folders import Image, ImageFolders, Images, options_of, stamp_of
from .jobs import Jobs
from .looks import Looks
from .runs import RunError

BETWEEN = "\n\n"
"""Stands between the captions of an image that has several."""
REPLACE, BEFORE, AFTER, ADD_TAG, REMOVE_TAG = "Replace", "Put before", "Put after", "Add tag", "Remove tag"
EVERYTHING, LEFT_OUT, NO_CAPTION, ALIKE = "All images", "Left out by training", "Without caption", "Duplicates"
FILTERS = (EVERYTHING, LEFT_OUT, NO_CAPTION, ALIKE)


def replaced(caption: str, find: str, other: str) -> str:
    """With other words in the place of some."""
    return caption.replace(find, other)


def with_tag(caption: str, tag: str, _: str) -> str:
    """With a tag at the end, unless it has it."""
    return caption if tag.strip() in tags_of(caption) else f"{SEPARATOR} ".join([*filter(None, [caption]), tag.strip()])


def without_tag(caption: str, tag: str, _: str) -> str:
    """Without a tag; a caption that has none of that name stays as it is."""
    tags = tags_of(caption)
    return f"{SEPARATOR} ".join(one for one in tags if one != tag.strip()) if tag.strip() in tags else caption


def tags_of(caption: str) -> list[str]:
    """The tags of a caption, as the trainer takes them apart."""
    return [tag.strip() for tag in caption.split(SEPARATOR) if tag.strip()]


OPERATIONS: dict[str, Callable[[str, str, str], str]] = {
    REPLACE: replaced,
    BEFORE: lambda caption, text, _: text + caption,
    AFTER: lambda caption, text, _: caption + text,
    ADD_TAG: with_tag,
    REMOVE_TAG: without_tag,
}


class ImageEdits:
    """Changes to the folders on the list, and what takes them back."""

    def __init__(self, folders: ImageFolders, jobs: Jobs) -> None:
        self.folders, self.jobs, self.looks = folders, jobs, Looks()
        self.refused: set[Path] = set()
        """Changes that could not be undone: those before them are not kept waiting."""

    def look(self, name: object, settings: Sequence = ()) -> Images:
        """What is in a folder; `settings`: resolution, whether there are buckets, caption column."""
        return self.folders.images(self.folders.find(name), options_of(*settings))

    def shown(self, images: Images, which: str, words: str = "") -> list[Image]:
        """The images that a filter leaves, and whose name or caption has these words."""
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
        """Writes the caption of one image, which must be what was seen of it; returns it as it is read now."""
        (image,) = images.find([name])
        if in_box(text_of(image)) != in_box(was):
            raise RunError(
                f"{name} was changed meanwhile, and nothing was written. Its caption is now: {text_of(image)!r}"
            )
        several = len(image.captions or ()) > 1
        captions = tuple(clean(part).strip() for part in (text.split(BETWEEN) if several else [text]))
        captions = tuple(filter(None, captions)) if several else captions
        self._write(images, [Edit(name, image.captions, captions)], f"the caption of {name}")
        return BETWEEN.join(captions)

    def change_captions(self, images: Images, names: object, operation: object, text: str, other: str = "") -> str:
        """Changes the captions of some images in the same way; returns a line about it."""
        if not isinstance(operation, str) or operation not in OPERATIONS:
            raise RunError(f"Choose one of: {', '.join(OPERATIONS)}.")
        if not str(text).strip():
            raise RunError("Say which words first.")
        edits = []
        for image in images.find(names):
            captions = tuple(
                OPERATIONS[operation](caption, str(text), str(other)).strip() for caption in image.captions or ("",)
            )
            if captions != (image.captions or ("",)):
                edits.append(Edit(image.name, image.captions, captions))
        if not edits:
            return "No caption had to be changed."
        line = f"{operation.lower()}, {pluralize(len(edits), 'caption')}"
        self._write(images, edits, line)
        return f"Changed: {line}."

    def _write(self, images: Images, edits: Sequence[Edit], line: str) -> None:
        refuse_bundled(images.folder)
        write(images, edits, line)

    def throw_away(self, images: Images, names: object) -> str:
        """Move images, with captions, masks and rows, into the folder's trash; return a line about it.

        An image that is listed twice goes with both of its rows, a caption file or mask with the last image that
        reads it.
        """
        refuse_bundled(images.folder)
        if (run := self.jobs.reader(images.folder.path)) is not None:
            raise RunError(f"{run.name} is training, maybe on these images; wait for it, or stop it first.")
        paths = {os.path.normpath(image.path) for image in images.find(names)}
        chosen = [image for image in images.images.values() if os.path.normpath(image.path) in paths]
        line = f"{pluralize(len(images.find(names)), 'image')} moved to the trash"
        with changing(images.folder, line) as draft:
            for metadata in {image.metadata for image in chosen if image.metadata}:
                table = Table(metadata, images)
                table.drop({image.name for image in chosen})
                table.put(draft)  # before the images: no row names one that is gone
            for path in files_with(chosen, images):
                draft.put(path, stamp_of(path), None)
        return f"{line[0].upper()}{line[1:]} (.trash in the folder, which training passes over)."

    def last(self, folder: Folder) -> Change | None:
        """What undo would take back: the last change of a folder."""
        found = (change for change in changes(folder) if change.place not in self.refused)
        return next(found, None) or next(changes(folder), None)

    def undo(self, images: Images, line: str | None = None) -> str:
        """Take the last change of a folder back; what has been changed again since stays, and undo is refused.

        `line`: of the change that is meant; undo is refused where another one is the last by now.
        """
        refuse_bundled(images.folder)
        change = self.last(images.folder)
        if change is None:
            return "There is nothing to undo."
        if line not in (None, change.line):
            raise RunError(f"Nothing was undone: the last change is another one by now ({change.line}).")
        try:
            change.restore()
        except RunError:
            self.refused.add(change.place)
            raise
        return f"Undone: {change.line}."

    def check(self, images: Images) -> Iterator[int]:
        """Opens every image of a folder: damaged ones and duplicates are known after that."""
        return self.looks.check(list(images.images.values()))


def files_with(chosen: Sequence[Image], images: Images) -> list[Path]:
    """Return the files of images that are there, and the masks and caption files that no other image reads."""
    paths = dict.fromkeys(image.path for image in chosen)
    others = [image for image in images.images.values() if image.path not in paths]
    stems = {image.path.with_suffix("") for image in others}
    captions = [text for path in paths if path.with_suffix("") not in stems for text in caption_files(path)]
    used = {path for image in others for path in (image.path, image.mask)}
    masks = [image.mask for image in chosen if image.mask is not None and image.mask not in used]
    return [path for path in dict.fromkeys([*paths, *captions, *masks]) if path.is_file()]


def text_of(image: Image) -> str:
    """The captions of an image as one text."""
    return BETWEEN.join(image.captions or ())


def in_box(text: str) -> str:
    """A text as a browser has it in a box: with line ends of one kind."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def refuse_bundled(folder: Folder) -> None:
    """The application's own images stay as they are."""
    if folder.bundled:
        raise RunError("The bundled images stay as they are; upload a folder, or start the application with --data.")
