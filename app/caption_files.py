"""Edit captions in the files from which the trainer reads them: a text file next to each image, or a metadata table.

A file is replaced only if it has not changed since it was read; otherwise the edit raises `RunError`.
"""

import csv
import io
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from reslora.images.data.caption_files import caption_files, read_caption
from reslora.images.data.dataset import read_metadata
from reslora.images.data.tables import ROWS
from reslora.options.prompts import clean

from .changes import Draft, changing
from .image_folders import Image, Images, leads_out, names_of
from .runs import RunError, stamp_of

Captions = tuple[str, ...] | None
"""Captions of an image. Empty: the image's table row has no caption. None: there is no table row or caption file."""


@dataclass(frozen=True)
class Edit:
    """New captions for an image."""

    name: str
    was: Captions
    """The captions that the user saw when editing."""
    captions: tuple[str, ...]

    def check(self, now: Captions) -> None:
        """Raise `RunError` if the current captions, `now`, are not the captions that the user saw."""
        if now != self.was:
            text = "\n\n".join(now or ())[:200]
            raise RunError(f"{self.name} was changed in the meantime; nothing was written. Its caption is now {text!r}")


def write(images: Images, edits: Sequence[Edit], line: str = "") -> None:
    """Write the new captions of all `edits`.

    `line` describes the change on the Undo button. Raises `RunError`, and writes nothing, if any edit cannot be made,
    such as an edit of captions that have changed since the user saw them.
    """
    if images.fixed:
        raise RunError(f"Captions cannot be changed here: {images.fixed}.")
    found, tables = images.find(edit.name for edit in edits), {}
    with changing(images.folder, line) as draft:
        for edit, image in zip(edits, found, strict=True):
            if leads_out(images.folder, image.path):
                raise RunError(f"{image.name} is a link to outside of the folder; nothing was changed.")
            if image.metadata is None:
                write_beside(edit, image, draft)
                continue
            if image.metadata not in tables:
                tables[image.metadata] = Table(image.metadata, images)
            tables[image.metadata].edit(edit)
        for table in tables.values():
            table.put(draft)


def caption_file(image: Image) -> Path:
    """Return the caption file of an image, which may not exist yet. Raises `RunError` if it cannot be decoded."""
    path = next(iter(caption_files(image.path)), image.path.with_suffix(".txt"))
    if path.is_file() and isinstance(problem := read_caption(path), str):
        raise RunError(f"{path.name}: {problem}; correct this file first.")
    return path


def write_beside(edit: Edit, image: Image, draft: Draft) -> None:
    """Add an edit to the draft, as new content of the caption file next to the image."""
    path = caption_file(image)
    stamp = stamp_of(path)
    read = read_caption(path) if stamp else None
    now = None if read is None else tuple(map(clean, read))
    # An image without a file shows its default caption, so the user saw that one.
    edit.check((image.otherwise,) if now is None and image.otherwise is not None and edit.was else now)
    if len(edit.captions) != 1:
        raise RunError(f"{edit.name} must have exactly one caption, because a caption file has one.")
    draft.put(path, stamp, clean(edit.captions[0]).strip().encode())


# -- tables ------------------------------------------------------------------------------------------------------------


class Table:
    """A metadata.jsonl or metadata.csv, stored as one text per row, so that unedited rows keep exactly their bytes.

    The constructor raises `InvalidArgument` if the trainer would refuse the table.
    """

    def __init__(self, path: Path, images: Images) -> None:
        self.path, self.images, self.stamp = path, images, stamp_of(path)
        self.is_csv = path.suffix == ".csv"
        self.options = images.options.replace(train_data_dir=str(path.parent))
        content = path.read_bytes()
        self.newline, self.marked = "\r\n" if b"\r\n" in content else "\n", content.startswith(b"\xef\xbb\xbf")
        found = read_metadata(path, self.options.data, self.options.training)
        self.captions = [tuple(captions) for captions in found.rows["captions"]]
        self.places = {name: place for place, name in enumerate(names_of(found.files, images.folder.path))}
        self.pieces: list[str] = []
        self.columns: list[str] = []
        self.values: list[dict] = []
        self.cut(path.read_text(encoding="utf-8-sig"))

    def cut(self, text: str) -> None:
        """Split the file's text into the text before the rows, one piece per row, and the text after the rows."""
        lines = list(io.StringIO(text))  # split at \n only, as the trainer does
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        start = 0
        if self.is_csv:
            reader = csv.reader(lines, strict=True)
            self.columns = next(filter(None, reader))  # lines before the column names may be empty
            start = reader.line_num
        self.head = "".join(lines[:start])
        for end, row in ROWS[self.path.suffix](text, self.path.name):
            self.pieces.append("".join(lines[start:end]))
            self.values.append(row if isinstance(row, dict) else {})
            start = end
        self.tail = "".join(lines[start:])

    def edit(self, edit: Edit) -> None:
        """Set an image's captions in its row; add a row if the table has none for the image."""
        place = self.places.get(edit.name)
        edit.check(None if place is None else self.captions[place])
        captions = tuple(map(clean, edit.captions))
        if self.is_csv and len(captions) > 1:
            raise RunError(f"{edit.name} can have only one caption, because {self.path.name} is a CSV file.")
        if place is None:
            self.pieces.append(self.new_row(edit.name, captions))
        else:
            self.pieces[place] = self.changed(place, captions)

    def drop(self, names: Collection[str]) -> None:
        """Remove the rows of the images with these names."""
        for name in names & self.places.keys():
            self.pieces[self.places[name]] = ""

    def changed(self, place: int, captions: tuple[str, ...]) -> str:
        """Return the text of row number `place` with new captions."""
        row, column = self.values[place], self.options.data.caption_column
        if not self.is_csv:
            escaped = self.pieces[place].isascii() and "\\u" in self.pieces[place]
            listed = isinstance(row[column], list) and captions
            value = list(captions) if listed or len(captions) > 1 else next(iter(captions), None)
            return f"{json.dumps(row | {column: value}, ensure_ascii=escaped)}\n"
        cells = next(cells for cells in csv.reader(io.StringIO(self.pieces[place])) if cells)
        cells += [""] * (len(self.columns) - len(cells))
        last = len(self.columns) - 1 - self.columns[::-1].index(column)  # the reader uses the last column of a name
        cells[last] = next(iter(captions), "")
        return csv_line(cells)

    def new_row(self, name: str, captions: tuple[str, ...]) -> str:
        """Return the text of a new row for the image with this name."""
        path = os.path.relpath(self.images.images[name].path, self.path.parent)
        column, value = self.options.data.caption_column, next(iter(captions), None)
        values = {"file_name": Path(path).as_posix(), column: value}
        if not self.is_csv:
            return f"{json.dumps(values, ensure_ascii=False)}\n"
        return csv_line([values.get(name) or "" for name in self.columns])

    def put(self, draft: Draft) -> None:
        """Add the table, with all edits, to the draft as the file's new content."""
        text = "".join([self.head, *self.pieces, self.tail])
        content = text.replace("\n", self.newline).encode("utf-8-sig" if self.marked else "utf-8")
        draft.put(self.path, self.stamp, content)


def csv_line(cells: Sequence[str]) -> str:
    """Return the cells of a row as a line of a CSV file."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()
