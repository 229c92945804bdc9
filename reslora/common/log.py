"""A run's `log.jsonl`: rows `{"step", "split", "loss", "lr", "seconds"}`, one a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ..files import replacing


def read_log(path: str | os.PathLike) -> list[dict]:
    """Rows of a log up to the first damaged line (a kill can cut the last one short); empty where there is no file."""
    rows = []
    try:
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    except (OSError, ValueError, RecursionError):
        pass
    return rows


class LogWriter:
    """Appends rows to a log, after keeping those up to the step that a run goes on from."""

    def __init__(self, path: str | os.PathLike, step: int = 0) -> None:
        kept = [row for row in read_log(path) if row["step"] <= step] if step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self.file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, row: dict) -> None:
        """Appends one row; it is in the file when this returns."""
        self.file.write(_line(row))
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def of_split(rows: Iterable[dict], split: str) -> list[dict]:
    """The rows of one split, `train` or `validation`."""
    return [row for row in rows if row.get("split") == split]


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"
