"""Rows of metadata.jsonl and metadata.csv with line numbers for errors, and checks of the files that rows name."""

import csv
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import datasets

from ...errors import InvalidArgument
from ...json_lines import NOT_JSON, values_of

REFERENCE = "conditioning_image"  # the column of the first reference images, whatever its name in the data is


def reference_column(number: int) -> str:
    """Return the name of the column with each image's reference image `number`, counted from 0."""
    return f"{REFERENCE}_{number + 1}" if number else REFERENCE


def reference_columns(names: Iterable[str]) -> list[str]:
    """Return the columns of reference images among all columns, in the order of the references."""
    return list(itertools.takewhile(set(names).__contains__, map(reference_column, itertools.count())))


def has_file_names(metadata: Path, layout: str | None) -> bool:
    """Return whether this module, and not `datasets`, reads a metadata file.

    - Parquet: `datasets` reads it.
    - .jsonl, and .csv with the column `file_name`: this module reads it, also with semicolons between the columns,
      and reports them.
    - Other .csv: `datasets` reads it if a column ends with `_file_name` or `file_names`, or if the folder has another
      layout. Otherwise this module reads it, and its error names the missing column.
    """
    if metadata.suffix != ".csv":
        return metadata.suffix in ROWS
    first: list[str] = []
    with metadata.open(encoding="utf-8-sig", errors="replace", newline="") as file, suppress(csv.Error):
        first = next(filter(None, csv.reader(file)), [])
    if "file_name" in first or _has_semicolons(first):
        return True
    return layout is None and not any(column.endswith(("_file_name", "file_names")) for column in first)


def _has_semicolons(first: Sequence[str]) -> bool:
    """Return whether semicolons separate a first line's columns, as Excel writes them for decimal commas."""
    return any("file_name" in cell.split(";") for cell in first if ";" in cell)


def _json_rows(text: str, where: str) -> Iterator[tuple[int, object]]:
    for number, row in values_of(text):
        if row is NOT_JSON:
            raise InvalidArgument(f"{where} line {number}", "is not JSON", "correct it")
        yield number, row


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, object]]:
    """Yield the rows of a CSV file; an empty cell becomes None, and empty lines before the header are skipped."""
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        _check_columns(text, where)
        rows.fieldnames = next(filter(None, rows.reader))
        for row in rows:
            if any(row.pop(None, ())):
                fix = "put captions with commas into double quotes"
                raise InvalidArgument(f"{where} line {rows.line_num}", "has more cells than the first line", fix)
            yield rows.line_num, {column: cell or None for column, cell in row.items()}
    except csv.Error as error:
        line = rows.reader.line_num
        raise InvalidArgument(f"{where} line {line}", f"cannot be read ({error})", "correct it") from None


def _check_columns(text: str, where: str) -> None:
    """Raise `InvalidArgument` if a table lacks the column file_name, or has semicolons between the columns.

    The parser accepts unmatched quotes here, so that semicolons are reported first.
    """
    reader = csv.reader(io.StringIO(text))
    columns = next(filter(None, reader), [])
    where_columns = f"{where} line {reader.line_num}"
    if not columns:
        raise InvalidArgument(where, "is empty", "write file_name,text there, and below it a row for each image")
    if _has_semicolons(columns):
        fix = "separate them with commas, and put captions into double quotes"
        raise InvalidArgument(where_columns, "semicolons between the columns", fix)
    if "file_name" not in columns:
        problem = f"the columns are {', '.join(map(repr, columns))[:200]}, without file_name"
        raise InvalidArgument(where_columns, problem, "write file_name,text there, with a comma between them")


ROWS = {".csv": _csv_rows, ".jsonl": _json_rows}


def names_files(rows: datasets.Dataset, column: str) -> bool:
    """Return whether a column holds plain text, that is, file names."""
    feature = rows.features[column]
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def file_inside(folder: Path, name: object, where: str, column: str) -> Path:
    """Return the path of the file that a row names; raises `InvalidArgument` if it is outside the folder."""
    nameless = InvalidArgument(where, f"names no image as its {column}", "correct it")
    if not isinstance(name, str):
        raise nameless
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):
        raise nameless from None
    if not inside:
        link = "a link to a file " if path.is_symlink() else ""
        raise InvalidArgument(
            where, f"names {name}, which is {link}outside of the folder", "move the image into the folder"
        )
    return path


def check_inside(row: Mapping, places: Sequence[Path], where: str) -> None:
    """Raise `InvalidArgument` if a path in a row, existing or not, is outside of `places`."""
    for column in ("image", "mask", *reference_columns(row)) if places else ():
        image = row.get(column)
        if image and image["path"] and image["bytes"] is None:
            path = Path(image["path"]).resolve()
            if not any(path.is_relative_to(place.resolve()) for place in places):
                problem = f"names {image['path']}, which is outside of the folder"
                raise InvalidArgument(where, problem, "move the image into the folder")


def unlisted(rows: datasets.Dataset, files: Sequence[Path]) -> list[Path]:
    """Return the image files that no row names as image, mask or reference image."""
    if not files:
        return []  # without reading all rows
    named = [image for column in rows.column_names if column != "captions" for image in rows[column]]
    there = {_whole_path(image["path"]) for image in named if image and image["path"]}
    return [path for path in files if _whole_path(path) not in there]


def _whole_path(path: str | Path) -> str:
    return os.path.normpath(Path(path).absolute())
