"""Changes to the files of a folder that can be undone, after a restart too: back up, then write.

A change has a folder of its own in `.trash`: the files as they were before, and a record of what they are after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reslora.errors import InvalidArgument, first_line
from reslora.images.content_hash import content_mark
from reslora.images.data.listing import TRASH
from reslora.io import read_object, remove, replacing, write_json

from .folders import Folder, new_place
from .image_folders import stamp_of
from .runs import RunError

RECORD = "change.json"
MOST = 50
"""Changes of a folder that are kept; removed images are kept until the user deletes them."""
WRITING = threading.RLock()
"""One change at a time in this process."""


@dataclass(frozen=True)
class Change:
    """A change that was made, or was cut off while it was made."""

    folder: Folder
    place: Path
    line: str
    """What it is, for the button Undo."""
    files: dict[str, str | None]
    """By the names of its files in the folder, the marks of their contents after it; None for a removed file."""

    def state(self, name: str) -> str:
        """`after` where a file is as the change left it, `before` where it is as it was, else `other`."""
        path, backup, after = self.folder.path / name, self.place / name, self.files[name]
        if not self.folder.holds(path):
            raise RunError(f"{name} leads out of the folder, and stays; nothing was undone.")
        now = mark_of(path)
        if now == after:
            return "after"
        if backup.exists():
            return "before" if after is not None and now == mark_of(backup) else "other"
        return "before" if None in (now, after) else "other"

    def restore(self) -> None:
        """Put the files back, and forget the change; `RunError` where somebody else has changed one since.

        What was cut off has files that it did not come to: its captions that nobody has changed are put back
        nevertheless.
        """
        with WRITING, readable():
            states = {name: self.state(name) for name in self.files}
            for name in (name for name, state in states.items() if state == "other"):
                if self.files[name] is None:
                    raise RunError(f"{name} is there again: move it away first. Nothing was put back.")
                if "before" not in states.values():
                    raise RunError(f"{name} was changed meanwhile. Nothing was put back.")
            for name, state in states.items():
                if state == "after":
                    put_back(self.place / name, self.folder.path / name)
            forget(self.place)


class Draft:
    """What a change is to write."""

    def __init__(self) -> None:
        self.files: dict[Path, tuple[tuple[int, ...], bytes | None]] = {}

    def put(self, path: Path, stamp: tuple[int, ...], content: bytes | None) -> None:
        """Plan the content of a file that had this stamp when it was read; None removes the file."""
        if self.files.setdefault(Path(os.path.normpath(path)), (stamp, content))[1] != content:
            raise RunError(f"{path.name} is the caption of several images: give them the same one.")


@contextlib.contextmanager
def changing(folder: Folder, line: str) -> Iterator[Draft]:
    """Yield a draft, and write all of it afterwards or, with `RunError`, nothing."""
    with WRITING, readable():
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
    """Back a file up and replace it, or move it there; `RunError` where it is not what was read."""
    backup.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.rename(backup)
        return
    if path.is_file():
        shutil.copy2(path, backup)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        if stamp_of(path) != stamp:
            raise RunError(f"{path.name} was changed meanwhile, and nothing was written; look at it anew.")


def put_back(backup: Path, path: Path) -> None:
    """Make a file what it was; without a backup there was none."""
    if os.path.lexists(backup):
        path.parent.mkdir(parents=True, exist_ok=True)
        backup.replace(path)
    else:
        path.unlink(missing_ok=True)


def forget(place: Path) -> None:
    """Remove a change from the trash."""
    with contextlib.suppress(OSError):
        remove(place)
        place.parent.rmdir()  # unless other changes are there


def changes(folder: Folder) -> Iterator[Change]:
    """The changes of a folder, the newest first."""
    for record in sorted((folder.path / TRASH).glob(f"*/{RECORD}"), reverse=True):
        with contextlib.suppress(OSError):
            content = read_object(record)
            files = content.get("files")
            if isinstance(files, dict) and all(map(is_inside, files)):
                yield Change(folder, record.parent, str(content.get("line"))[:200], files)


def is_inside(name: str) -> bool:
    """Whether a name is that of a file in the folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def mark_of(path: Path) -> str | None:
    """The content of a file in short; None where there is none."""
    return content_mark(path) if path.is_file() else None


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Report what keeps a file from being read or written in one line without paths."""
    try:
        yield
    except InvalidArgument as error:
        text = str(error)
        text = text.split(", ", 1)[1] if text.startswith("--") and ", " in text else text
        raise RunError(f"The captions cannot be changed: {text}.") from None
    except OSError as error:
        raise RunError(f"Nothing was changed: {error.strerror or first_line(error)}.") from None
