"""Files with one JSON value a line, as people give them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidArgument

NOT_JSON = object()
"""In place of the value of a line that is none."""


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Number, from 1, and value of each line that is not blank; `NOT_JSON` for one that cannot be read."""
    return values_of(path.read_text(encoding="utf-8", errors="replace"))


def data_lines(path: Path, where: str, fix: str) -> Iterator[tuple[int, object]]:
    """The same of a file to learn from, in which nothing is replaced or left out: text that is not JSON, not UTF-8, or
    has half of a character raises `InvalidArgument` naming the line; `fix` is for what is not JSON."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidArgument(f"{where} line {line}", "is not UTF-8", "save the file as UTF-8") from None
    for number, value in values_of(text):
        if value is NOT_JSON:
            raise InvalidArgument(f"{where} line {number}", "is not JSON", fix)
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"{error.object[error.start]!a}"
            raise InvalidArgument(f"{where} line {number}", f"has half of a character, {half}", "correct it") from None
        yield number, value


def values_of(text: str) -> Iterator[tuple[int, object]]:
    """As `json_lines`, of a text."""
    # Not splitlines(): inside a JSON string it would break at U+2028 and its like.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, NOT_JSON
