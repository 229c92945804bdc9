"""Make the new contents of the files from which the trainer reads captions: a text file per image, or a table."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from reslora.images.data.caption_files import caption_files, read_caption
from reslora.options.prompts import clean

from .image_folders import Image, Images, defaults
from .runs import RunError

COLUMN = defaults().data.caption_column
Captions = Mapping[str, Sequence[str]]
"""New captions by the image's name."""
BETWEEN = "\n\n"
"""Separator between the captions of an image in a text box, if the image's table row has several captions."""


def with_captions(images: Images, captions: Captions) -> dict[Path, bytes | None]:
    """Return the new contents of the files that store the captions of these images.

    Raises `RunError` if a caption cannot be stored, or the file of one cannot be decoded.
    """
    found = {image: [clean(text).strip() for text in captions[image.name]] for image in images.find(captions)}
    files: dict[Path, bytes | None] = {}
    for table in {image.table for image in found}:
        changed = {image: texts for image, texts in found.items() if image.table == table}
        if table:
            files[table] = with_rows(table, changed)
        else:
            files |= {caption_file(image): BETWEEN.join(texts).encode() for image, texts in changed.items()}
    return files


def caption_file(image: Image) -> Path:
    """Return the caption file of an image, which may not exist yet. Raises `RunError` if the caption file cannot be
    decoded.
    """
    path = next(iter(caption_files(image.path)), image.path.with_suffix(".txt"))
    if path.is_file() and isinstance(problem := read_caption(path), str):
        raise RunError(f"{path.name}: {problem}; correct this file first.")
    return path


def with_rows(table: Path, changed: Mapping[Image, Sequence[str]], dropped: Sequence[Image] = ()) -> bytes:
    """Return the content of a table with new captions; an image that the table does not list gets a row.

    `dropped`: images whose rows are removed. The other rows keep their values.
    """
    text, columns = table.read_text(encoding="utf-8-sig"), []
    if is_csv := table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text.lstrip()), restval="")
        columns, rows = list(reader.fieldnames or ()), list(reader)
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    for image, captions in changed.items():
        if image.row is None:
            rows.append({"file_name": Path(os.path.relpath(image.path, table.parent)).as_posix()})
        rows[-1 if image.row is None else image.row][COLUMN] = captions[0] if len(captions) == 1 else list(captions)
    gone = {image.row for image in dropped}
    rows = [row for number, row in enumerate(rows) if number not in gone]
    file = io.StringIO()
    if is_csv:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    return file.getvalue().encode()
