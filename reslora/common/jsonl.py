"""Files with one JSON value a line, as people give them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

NOT_JSON = object()
"""In place of the value of a line that is none."""


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Number, from 1, and value of each line that is not blank; `NOT_JSON` for one that cannot be read."""
    # Not splitlines(): inside a JSON string it would break at U+2028 and its like.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, NOT_JSON
