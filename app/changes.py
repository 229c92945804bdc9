"""Back up files before changing them, so that changes to a folder can be undone, even after a restart.

Each change has its own folder in `.trash`, with the files as they were before the change, and a record of the files'
hashes after the change.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reslora.content_hash import content_mark
from reslora.errors import InvalidArgument, first_line
from reslora.images.data.listing import TRASH
from reslora.io import read_object, remove, replacing, write_json

from .folders import Folder, new_place
from .runs import RunError, stamp_of

RECORD = "change.json"
MOST = 50
"""Maximum number of changes that are stored per folder. Older changes are deleted, except those that removed files (for
example, images moved to the trash)."""
WRITING = threading.RLock()
"""Lock that serializes changes within this process."""


@dataclass(frozen=True)
class Change:
    """A stored change to the files of a folder; an interrupted change wrote only some of the files."""

    folder: Folder
    place: Path
    line: str
    """Description of the change on the Undo button."""
    files: dict[str, str | None]
    """Content hashes after the change, by file name within the folder; None for a removed file."""

    def state(self, name: str) -> str:
        """Return `before` or `after` if the file's content is that from before or after the change, else `other`.

        Raises `RunError` if `name` is a link to outside of the folder.
        """
        path, backup, after = self.folder.path / name, self.place / name, self.files[name]
        if not self.folder.holds(path):
            raise RunError(f"{name} is a link to outside of the folder; nothing was undone.")
        now = mark_of(path)
        if now == after:
            return "after"
        if backup.exists():
            return "before" if after is not None and now == mark_of(backup) else "other"
        return "before" if None in (now, after) else "other"

    def restore(self) -> None:
        """Restore the files as they were before the change, and delete the stored change.

        If the change was complete, raises `RunError` if one of the files was changed later. If it was interrupted,
        restores the files that it wrote and that were not changed later.
        """
        with WRITING, readable():
            states = {name: self.state(name) for name in self.files}
            for name in (name for name, state in states.items() if state == "other"):
                if self.files[name] is None:
                    raise RunError(f"{name} exists again: move this file away first. Nothing was restored.")
                if "before" not in states.values():
                    raise RunError(f"{name} was changed later, so nothing was restored.")
            for name, state in states.items():
                if state == "after":
                    put_back(self.place / name, self.folder.path / name)
            forget(self.place)


class Draft:
    """New contents of the files that a change will write."""

    def __init__(self) -> None:
        self.files: dict[Path, tuple[tuple[int, ...], bytes | None]] = {}

    def put(self, path: Path, stamp: tuple[int, ...], content: bytes | None) -> None:
        """Add the new content of a file; None removes the file.

        `stamp`: the result of `stamp_of` when the file was read. Raises `RunError` if the draft already has a different
        content for the file.
        """
        if self.files.setdefault(Path(os.path.normpath(path)), (stamp, content))[1] != content:
            raise RunError(f"{path.name} is the caption file of several images: give these images the same caption.")


@contextlib.contextmanager
def changing(folder: Folder, line: str) -> Iterator[Draft]:
    """Yield an empty draft; when the `with` block ends, write all files of the draft, or none.

    `line` describes the change on the Undo button. Nothing is written if the block raises an error. Raises `RunError`
    if a file cannot be written, or has changed since it was read.
    """
    with WRITING, readable():
        if (folder.path / TRASH).is_symlink():
            raise RunError(f"{TRASH} in the folder of images is a link; remove the link first.")
        draft = Draft()
        yield draft
        place, done = new_place(folder.path), []
        names = {path.relative_to(folder.path).as_posix(): path for path in draft.files}
        contents = {name: draft.files[path][1] for name, path in names.items()}
        marks = {name: None if content is None else content_mark(content) for name, content in contents.items()}
        write_json(place / RECORD, {"line": line, "files": marks})
        try:
            for name, path in names.items():
                write(path, place / name, *draft.files[path])
                done.append(name)
        except BaseException:
            for name in done:
                put_back(place / name, names[name])
            forget(place)
            raise
        for old in list(changes(folder))[MOST:]:
            if None not in old.files.values():
                forget(old.place)


def write(path: Path, backup: Path, stamp: tuple[int, ...], content: bytes | None) -> None:
    """Copy a file to `backup` and replace its content; if `content` is None, move the file to `backup`.

    `stamp`: the result of `stamp_of` when the file was read. Raises `RunError` if a file to replace has changed since.
    """
    backup.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.rename(backup)
        return
    if path.is_file():
        shutil.copy2(path, backup)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if stamp_of(path) != stamp:
            raise RunError(f"{path.name} was changed in the meantime, and nothing was written; reload the folder.")


def put_back(backup: Path, path: Path) -> None:
    """Move `backup` back to `path`; if there is no backup, remove the file at `path`."""
    if os.path.lexists(backup):
        path.parent.mkdir(parents=True, exist_ok=True)
        backup.replace(path)
    else:
        path.unlink(missing_ok=True)


def forget(place: Path) -> None:
    """Delete a change's folder, `place`, from the trash."""
    with contextlib.suppress(OSError):
        remove(place)
        place.parent.rmdir()  # fails if other changes are there


def changes(folder: Folder) -> Iterator[Change]:
    """Yield the stored changes of a folder, newest first. Those whose stored files are outside of it are left out."""
    for record in sorted((folder.path / TRASH).glob(f"*/{RECORD}"), reverse=True):
        with contextlib.suppress(OSError, RuntimeError):
            content, place = read_object(record), record.parent
            files = content.get("files")
            if isinstance(files, dict) and all(is_inside(place, name) for name in (RECORD, *files)):
                yield Change(folder, place, str(content.get("line"))[:200], files)


def is_inside(place: Path, name: str) -> bool:
    """Return whether `name` is a relative path without `..`, and no link to a folder leads out of `place`."""
    path = place / name
    return ".." not in path.parts and path.parent.resolve().is_relative_to(place)


def mark_of(path: Path) -> str | None:
    """Return the content hash of a file, or None if it does not exist."""
    return content_mark(path) if path.is_file() else None


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Convert errors of reading and writing files to a `RunError` with one line that contains no paths."""
    try:
        yield
    except InvalidArgument as error:
        text = str(error)
        text = text.split(", ", 1)[1] if text.startswith("--") and ", " in text else text
        raise RunError(f"The captions cannot be changed: {text}.") from None
    except OSError as error:
        raise RunError(f"Nothing was changed: {error.strerror or first_line(error)}.") from None
