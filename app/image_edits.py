"""What a visitor does with a folder of images: change captions, one or many at once, throw images away, undo."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reslora.diffusion.data.captions import SEPARATOR
from reslora.files import remove
from reslora.words import counted

from . import trash
from .caption_files import Edit, unfinished, write
from .folders import Folder
from .image_folders import Image, ImageFolders, Images, options_of
from .launcher import Trainings
from .looks import Looks
from .runs import RunError

BETWEEN = "\n\n"
"""Stands between the captions of an image that has several."""
REPLACE, BEFORE, AFTER, ADD_TAG, REMOVE_TAG = "Replace", "Put before", "Put after", "Add tag", "Remove tag"
EVERYTHING, LEFT_OUT, NO_CAPTION, ALIKE = "All images", "Left out by training", "Without caption", "Duplicates"
FILTERS = (EVERYTHING, LEFT_OUT, NO_CAPTION, ALIKE)
UNDONE = 50
"""Changes of a folder that can be taken back."""


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


@dataclass(frozen=True, eq=False)
class Change:
    """Something that can be taken back; one that does the same again is another one."""

    line: str
    edits: tuple[Edit, ...] = ()
    trash: Path | None = None
    noted: Path | None = None
    """Where the edits are noted that were cut off: some of them are not written."""


class ImageEdits:
    """Changes to the folders on the list, and what takes them back."""

    def __init__(self, folders: ImageFolders, trainings: Trainings) -> None:
        self.folders, self.trainings, self.looks = folders, trainings, Looks()
        self.history: dict[Path, deque[Change]] = defaultdict(lambda: deque(maxlen=UNDONE))
        self.lock = threading.Lock()

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
        if image.captions and len(image.captions) > 1:
            parts = [part.strip() for part in text.split(BETWEEN) if part.strip()]
            captions = tuple(parts)
        else:
            captions = (text.strip(),)
        (done,) = self._write(images, [Edit(name, image.captions, captions)], f"the caption of {name}")
        return BETWEEN.join(done.captions or ())

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
        line = f"{operation.lower()}, {counted(len(edits), 'caption')}"
        self._write(images, edits, line)
        return f"Changed: {line}."

    def _write(self, images: Images, edits: Sequence[Edit], line: str) -> list[Edit]:
        refuse_bundled(images.folder)
        done = write(images, edits)
        self._remember(images.folder, Change(line, tuple(edit.reverse for edit in done)))
        return done

    def throw_away(self, images: Images, names: object) -> str:
        """Moves images and their captions into the folder's trash; returns a line about it."""
        refuse_bundled(images.folder)
        if (run := self.trainings.reader(images.folder.path)) is not None:
            raise RunError(f"{run.name} is training, maybe on these images; wait for it, or stop it first.")
        chosen = images.find(names)
        place = trash.throw_away(images, chosen)
        line = f"{counted(len(chosen), 'image')} moved to the trash"
        self._remember(images.folder, Change(line, trash=place))
        return f"{line[0].upper()}{line[1:]} (.trash in the folder, which training passes over)."

    def _remember(self, folder: Folder, change: Change) -> None:
        with self.lock:
            self.history[folder.path].append(change)

    def last(self, folder: Folder) -> Change | None:
        """What undo would take back: the last change of a folder, else what was cut off, else what is in its trash."""
        with self.lock:
            for change in reversed(self.history[folder.path]):
                if change.trash is None or change.trash.is_dir():
                    return change
        if (found := unfinished(folder.path)) is not None:
            noted, edits = found
            line = f"a change of {counted(len(edits), 'caption')} that was cut off"
            return Change(line, tuple(edit.reverse for edit in edits), noted=noted)
        place = next(iter(trash.thrown_away(folder.path)), None)
        if place is None:
            return None
        return Change(f"{counted(trash.count(place), 'file')} moved to the trash {place.name[:8]}", trash=place)

    def undo(self, images: Images, line: str | None = None) -> str:
        """Takes the last change of a folder back; what has been changed again since stays, and undo is refused.

        `line`: of the change that is meant; undo is refused where another one is the last by now.
        """
        refuse_bundled(images.folder)
        change = self.last(images.folder)
        if change is None:
            return "There is nothing to undo."
        if line not in (None, change.line):
            raise RunError(f"Nothing was undone: the last change is another one by now ({change.line}).")
        if change.trash is not None:
            trash.put_back(images, change.trash)
        try:
            if edits := change.edits if change.noted is None else written(images, change.edits):
                write(images, edits)
            if change.noted is not None:
                remove(change.noted)
        finally:  # one that cannot be taken back is not in the way of those before it
            with self.lock, suppress(ValueError):
                self.history[images.folder.path].remove(change)
        return f"Undone: {change.line}."

    def check(self, images: Images) -> Iterator[int]:
        """Opens every image of a folder: damaged ones and duplicates are known after that."""
        return self.looks.check(list(images.images.values()))


def written(images: Images, edits: Sequence[Edit]) -> list[Edit]:
    """Those of the edits whose captions are what they are to be taken back from."""
    known = {name: image.captions for name, image in images.images.items()}
    return [edit for edit in edits if edit.name in known and known[edit.name] == edit.was]


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
