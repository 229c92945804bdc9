"""Read JSON Lines files given by the user."""

import json
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidArgument

NOT_JSON = object()
"""Value of a line that is not valid JSON."""


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield line number (from 1) and value of each non-blank line; the value of an invalid line is `NOT_JSON`."""
    return values_of(path.read_text(encoding="utf-8", errors="replace"))


def data_lines(path: Path, where: str, fix: str) -> Iterator[tuple[int, object]]:
    """Yield line number and value of each non-blank line of a training file; any invalid line is an error.

    Raises `InvalidArgument` for a line that is not JSON, is not UTF-8, or contains half of a surrogate pair. `where`:
    name of the file in the message. `fix`: advice for lines that are not JSON.
    """
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
            raise InvalidArgument(
                f"{where} line {number}", f"contains half of a surrogate pair, {half}", "remove it"
            ) from None
        yield number, value


def values_of(text: str) -> Iterator[tuple[int, object]]:
    """Yield line number and value of each non-blank line of a text; see `json_lines`."""
    # Not splitlines(), which would split a JSON string at U+2028 and similar characters.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, NOT_JSON
