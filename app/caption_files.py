"""Make the new contents of the files from which the trainer reads captions: a text file per image, or a table."""

import codecs
import csv
import io
import json
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from reslora.images.data.caption_files import caption_files, read_caption
from reslora.options.prompts import clean

from .image_folders import Image, Images, defaults
from .runs import RunError

COLUMN = defaults().data.caption_column
Rows = dict[int | str, Sequence[str]]
"""New captions by the number of a table's row, or by the file name of an image that gets a row."""
Captions = Mapping[str, Sequence[str]]
"""New captions by the image's name."""
BETWEEN = "\n\n"
"""Separator between the captions of an image in a text box, if the image's table row has several captions."""


def with_captions(images: Images, captions: Captions) -> dict[Path, bytes | None]:
    """Return the new contents of the files that store the captions of these images.

    Raises `RunError` if a caption cannot be stored, or the file of one cannot be decoded.
    """
    files: dict[Path, bytes | None] = {}
    tables: dict[Path, dict[Image, list[str]]] = {}
    for image in images.find(captions):
        texts = [clean(text).strip() for text in captions[image.name]]
        if image.table:
            tables.setdefault(image.table, {})[image] = texts
        else:
            files[caption_file(image)] = BETWEEN.join(texts).encode()
    return files | {table: with_rows(table, changed) for table, changed in tables.items()}


def caption_file(image: Image) -> Path:
    """Return the caption file of an image, which may not exist yet. Raises `RunError` if it cannot be decoded."""
    path = next(iter(caption_files(image.path)), image.path.with_suffix(".txt"))
    if path.is_file() and isinstance(problem := read_caption(path), str):
        raise RunError(f"{path.name}: {problem}; correct this file first.")
    return path


def with_rows(table: Path, changed: Mapping[Image, Sequence[str]], dropped: Sequence[Image] = ()) -> bytes:
    """Return the content of a table with new captions; an image that the table does not list gets a row.

    `dropped`: images whose rows are removed. The other rows keep their values.
    """
    mark, text = table.read_bytes().startswith(codecs.BOM_UTF8), table.read_text(encoding="utf-8-sig")
    rows: Rows = {}
    for image, texts in changed.items():
        name = Path(os.path.relpath(image.path, table.parent)).as_posix()
        rows[name if image.row is None else image.row] = texts
    edited = (csv_with if table.suffix == ".csv" else json_lines_with)(text, rows, {image.row for image in dropped})
    return edited.encode("utf-8-sig" if mark else "utf-8")


def json_lines_with(text: str, rows: Rows, dropped: Container[int | None]) -> str:
    """Return the text of a metadata.jsonl with new captions, and without the rows with the numbers in `dropped`."""
    lines: dict[int | str, str] = dict(enumerate(line for line in text.split("\n") if line.strip()))
    for key, captions in rows.items():
        values = json.loads(lines[key]) if key in lines else {"file_name": key, COLUMN: None}
        is_list = len(captions) > 1 or (isinstance(values[COLUMN], list) and captions)
        values[COLUMN] = list(captions) if is_list else next(iter(captions), None)
        lines[key] = json.dumps(values, ensure_ascii=False)
    return "".join(f"{line}\n" for key, line in lines.items() if key not in dropped)


def csv_with(text: str, rows: Rows, dropped: Container[int | None]) -> str:
    """Return the text of a metadata.csv with new captions, and without the rows with the numbers in `dropped`."""
    columns, *cells = filter(None, csv.reader(io.StringIO(text)))
    lines: dict[int | str, list[str]] = dict(enumerate(cells))
    place = len(columns) - 1 - columns[::-1].index(COLUMN)  # the trainer reads the last column of a name
    for key, captions in rows.items():
        values = lines.setdefault(key, [key if column == "file_name" else "" for column in columns])
        values += [""] * (len(columns) - len(values))
        values[place] = next(iter(captions), "")
    file = io.StringIO()
    kept = (values for key, values in lines.items() if key not in dropped)
    csv.writer(file, lineterminator="\n").writerows([columns, *kept])
    return file.getvalue()
