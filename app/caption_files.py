"""Captions as the trainer reads them, changed where they are: in a file beside each image, or in rows of a table.

A file is replaced whole, and only if it is what the change was made from: what somebody else has changed meanwhile
stays, and whoever was late is told.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reslora.common.errors import InvalidArgument, first_line
from reslora.diffusion.data.caption_files import caption_files, read_caption
from reslora.diffusion.data.dataset import read_metadata
from reslora.diffusion.data.listing import TRASH
from reslora.diffusion.data.tables import ROWS
from reslora.files import read_object, remove, replacing, write_json
from reslora.options.images import Options
from reslora.options.prompts import clean

from .folders import new_place
from .image_folders import Image, Images, leads_out, names_of, stamp_of
from .runs import RunError

Captions = tuple[str, ...] | None
"""Of an image; empty: its row has none; None: there is neither a row nor a file."""
WRITING = threading.RLock()
"""One change at a time, of this process."""
NOTED: set[Path] = set()
"""Where the changes are noted that this process is writing."""
NOTE = "captions.json"


@dataclass(frozen=True)
class Edit:
    """Other captions for an image."""

    name: str
    was: Captions
    """What they were when the change was decided on."""
    captions: Captions

    @property
    def reverse(self) -> Edit:
        """What takes it back."""
        return dataclasses.replace(self, was=self.captions, captions=self.was)


def write(images: Images, edits: Sequence[Edit]) -> list[Edit]:
    """Writes all of the changes or, with `RunError`, none; returns what was changed, as it is read now.

    Refused where captions are not what they were when the change was decided on.
    """
    if images.fixed:
        raise RunError(f"Captions cannot be changed here: {images.fixed}.")
    found = images.find(edit.name for edit in edits)
    beside: list[tuple[Edit, Image]] = []
    rows: dict[Path, dict[str, Edit]] = {}
    for edit, image in zip(edits, found, strict=True):
        if leads_out(images.folder, image.path):
            raise RunError(f"{image.name} leads out of the folder, and its caption stays; nothing was changed.")
        if image.metadata is None:
            beside.append((edit, image))
        else:
            rows.setdefault(image.metadata, {})[edit.name] = edit
    several = noted(images.folder.path, edits) if len(beside) + len(rows) > 1 else contextlib.nullcontext()
    with WRITING, readable(), several, contextlib.ExitStack() as undo:
        done = _write_files(beside, undo)
        for path, own in rows.items():
            table = Table.read(path, images)
            done += table.edit(own)
            before = path.read_bytes()
            table.write()
            undo.callback(_restore, path, before)
        undo.pop_all()
    return done


@contextlib.contextmanager
def noted(root: Path, edits: Sequence[Edit]) -> Iterator[None]:
    """Notes changes in the trash of a folder until all are written: who is killed half way leaves what undoes them."""
    place = new_place(root)
    NOTED.add(place)
    try:
        new = [edit.captions and [*map(clean, edit.captions)] for edit in edits]
        write_json(place / NOTE, {"edits": [(edit.name, edit.was, now) for edit, now in zip(edits, new, strict=True)]})
        yield
    finally:
        with contextlib.suppress(OSError):
            remove(place)
            place.parent.rmdir()  # unless something else is in the trash
        NOTED.remove(place)


def unfinished(root: Path) -> tuple[Path, list[Edit]] | None:
    """The last changes of a folder that were noted and maybe not all written, and where they were noted."""
    for path in sorted((root / TRASH).glob(f"*/{NOTE}"), reverse=True):
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError):
            edits = [Edit(name, as_captions(was), as_captions(new)) for name, was, new in read_object(path)["edits"]]
            if path.parent not in NOTED:
                return path.parent, edits
    return None


def as_captions(value: list | None) -> Captions:
    """Captions as JSON has them."""
    return None if value is None else tuple(map(str, value))


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """What keeps a file from being read or written, as one line without paths."""
    try:
        yield
    except InvalidArgument as error:
        raise RunError(f"The captions cannot be changed: {_name_alone(str(error))}.") from None
    except OSError as error:
        raise RunError(f"Nothing was changed: {error.strerror or first_line(error)}.") from None


def _name_alone(text: str) -> str:
    """A trainer's line from the name of the file on."""
    return text.split(", ", 1)[1] if text.startswith("--") and ", " in text else text


def _check(edit: Edit, now: Captions) -> None:
    if now != edit.was:
        text = "\n\n".join(now or ())[:200]
        raise RunError(f"{edit.name} was changed meanwhile, and nothing was written. Its caption is now: {text!r}")


# -- files beside images -----------------------------------------------------------------------------------------------


def captions_beside(image: Image) -> Captions:
    """What is in the caption file of an image now."""
    files = caption_files(image.path)
    if not files:
        return None
    found = read_caption(files[0])
    if isinstance(found, str):
        raise RunError(f"{files[0].name}: {found}; correct the file first.")
    return tuple(map(clean, found))


def _write_files(edits: Sequence[tuple[Edit, Image]], undo: contextlib.ExitStack) -> list[Edit]:
    """Writes caption files once all of them are known to be what they were."""
    done: list[Edit] = []
    texts: dict[Path, str | None] = {}
    stamps: dict[Path, tuple[int, ...]] = {}
    for edit, image in edits:
        path = next(iter(caption_files(image.path)), image.path.with_suffix(".txt"))
        stamps.setdefault(path, stamp_of(path))
        now = captions_beside(image)
        # What the visitor saw of an image without a file is what it has otherwise.
        _check(edit, (image.otherwise,) if now is None and image.otherwise is not None and edit.was else now)
        if edit.captions is not None and len(edit.captions) != 1:
            raise RunError(f"{edit.name} has one caption, in the file beside it.")
        text = None if edit.captions is None else clean(edit.captions[0]).strip()
        if texts.setdefault(path, text) != text:
            raise RunError(f"{path.name} is the caption of several images: give them the same one.")
        done.append(Edit(edit.name, now, None if text is None else (text,)))
    for path, text in texts.items():
        if stamp_of(path) != stamps[path]:
            raise RunError(f"{path.name} was changed meanwhile, and nothing was written; look at it anew.")
        before = path.read_bytes() if path.is_file() else None
        undo.callback(_restore, path, before)
        _restore(path, None if text is None else text.encode())
    return done


def _restore(path: Path, content: bytes | None) -> None:
    """Makes a file what it was; None: there was none."""
    if content is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


# -- tables ------------------------------------------------------------------------------------------------------------


class Table:
    """metadata.jsonl or metadata.csv, a piece of text for each row: what is not changed stays byte for byte."""

    def __init__(self, path: Path, images: Images) -> None:
        self.path, self.images, self.stamp = path, images, stamp_of(path)
        self.options: Options = images.options.replace(train_data_dir=str(path.parent))
        content = path.read_bytes()
        self.newline, self.marked = "\r\n" if b"\r\n" in content else "\n", content.startswith(b"\xef\xbb\xbf")
        self.head = self.tail = ""
        self.pieces: list[str] = []
        self.columns: list[str] = []
        self.names: list[str] = []
        self.captions: list[Captions] = []
        self.values: list[dict] = []

    @classmethod
    def read(cls, path: Path, images: Images) -> Table:
        """The table as it is now; raises `InvalidArgument` as the trainer does."""
        table = cls(path, images)
        found = read_metadata(path, table.options.data, table.options.training)
        table.names = names_of(found.files, images.folder.path)
        table.captions = [tuple(captions) for captions in found.rows["captions"]]
        table.cut(path.read_text(encoding="utf-8-sig"))
        return table

    @property
    def is_csv(self) -> bool:
        return self.path.suffix == ".csv"

    def cut(self, text: str) -> None:
        """Cuts the text into pieces, one a row."""
        lines = list(io.StringIO(text))  # cut at \n alone, as the trainer does
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        start = 0
        if self.is_csv:
            reader = csv.reader(lines, strict=True)
            self.columns = next(filter(None, reader))  # lines before them may be empty
            start = reader.line_num
        self.head = "".join(lines[:start])
        for end, row in ROWS[self.path.suffix](text, self.path.name):
            self.pieces.append("".join(lines[start:end]))
            self.values.append(row if isinstance(row, dict) else {})
            start = end
        self.tail = "".join(lines[start:])

    def edit(self, edits: Mapping[str, Edit]) -> list[Edit]:
        """Changes rows by the names of their images; None in the place of captions takes one away."""
        places = {name: place for place, name in enumerate(self.names)}
        for name, edit in edits.items():
            _check(edit, self.captions[places[name]] if name in places else None)
        done = []
        for name, edit in edits.items():
            captions = None if edit.captions is None else tuple(map(clean, edit.captions))
            if self.is_csv and captions is not None and len(captions) > 1:
                raise RunError(f"{name} has one caption, in {self.path.name}.")
            if self.is_csv and captions == ("",):
                captions = ()  # which an empty cell is
            place = places.get(name)
            if place is None and captions is not None:
                self.insert(len(self.pieces), self.new_row(name, captions))
            elif place is not None:
                self.pieces[place] = "" if captions is None else self.changed(place, captions)
            done.append(Edit(name, edit.was, captions))
        return done

    def changed(self, place: int, captions: tuple[str, ...]) -> str:
        """The text of a row with other captions."""
        row, column = self.values[place], self.options.data.caption_column
        if not self.is_csv:
            escaped = self.pieces[place].isascii() and "\\u" in self.pieces[place]
            listed = isinstance(row[column], list) and captions
            value = list(captions) if listed or len(captions) > 1 else next(iter(captions), None)
            return f"{json.dumps(row | {column: value}, ensure_ascii=escaped)}\n"
        cells = next(cells for cells in csv.reader(io.StringIO(self.pieces[place])) if cells)
        cells += [""] * (len(self.columns) - len(cells))
        last = len(self.columns) - 1 - self.columns[::-1].index(column)  # of columns of one name the last is read
        cells[last] = next(iter(captions), "")
        return csv_line(cells)

    def new_row(self, name: str, captions: tuple[str, ...]) -> str:
        """The text of a row for an image that has none."""
        path = os.path.relpath(self.images.images[name].path, self.path.parent)
        column, value = self.options.data.caption_column, next(iter(captions), None)
        values = {"file_name": Path(path).as_posix(), column: value}
        if not self.is_csv:
            return f"{json.dumps(values, ensure_ascii=False)}\n"
        return csv_line([values.get(name) or "" for name in self.columns])

    def insert(self, place: int, piece: str) -> None:
        """Puts the text of a row where a row was."""
        self.pieces.insert(min(place, len(self.pieces)), piece)

    def take(self, names: Iterable[str]) -> list[tuple[int, str]]:
        """Takes rows away by the names of their images; their places and texts."""
        names = set(names)
        places = [place for place, name in enumerate(self.names) if name in names]
        taken = [(place, self.pieces[place]) for place in places]
        for place in places:
            self.pieces[place] = ""
        return taken

    def write(self) -> None:
        """Replaces the file, unless it is another one than was read."""
        text = "".join([self.head, *self.pieces, self.tail])
        content = text.replace("\n", self.newline).encode("utf-8-sig" if self.marked else "utf-8")
        with replacing(self.path) as temporary:
            temporary.write_bytes(content)
            if stamp_of(self.path) != self.stamp:
                raise RunError(f"{self.path.name} was changed meanwhile, and nothing was written; look at it anew.")


def csv_line(cells: Sequence[str]) -> str:
    """Cells as a line of a CSV file."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()
