"""Read and write a run's `log.jsonl`: rows `{"step", "split", "loss", "lr", "seconds"}`, one for each line."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..io import replacing
from ..json_lines import json_lines


def read_log(path: Path) -> list[dict]:
    """Return the rows of a log without damaged lines (a kill can truncate the last one); empty without a file."""
    return [row for row in _lines(path) if row is not None]


def count_damaged(path: Path) -> int:
    """Return the number of lines of a log that are not valid rows."""
    return sum(row is None for row in _lines(path))


def _lines(path: Path) -> list[dict | None]:
    """Return each line's row; None for an invalid line."""
    try:
        values = [value for _, value in json_lines(path)]
    except OSError:
        return []
    return [value if isinstance(value, dict) and isinstance(value.get("step"), int) else None for value in values]


class LogWriter:
    """Append rows to a log; rows after the step that a run resumes from are removed first, `kept` are the others."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.kept = [row for row in read_log(path) if row["step"] <= step] if step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Append one row and flush it to the file."""
        with self._named():
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file; a row that could not be written is tried once more, and may raise again."""
        with self._named():
            self.file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the log in an `OSError` such as a full disk, which does not know its file."""
        try:
            yield
        except OSError as error:
            error.filename = self.file.name
            raise


def of_split(rows: Iterable[dict], split: str) -> list[dict]:
    """Return the rows of one split, `train` or `validation`."""
    return [row for row in rows if row.get("split") == split]
