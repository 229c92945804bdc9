"""Read and write a run's `log.jsonl`; each line is a row `{"step", "split", "loss", "lr", "seconds"}`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..io import replacing
from ..json_lines import json_lines


def read_log(path: Path) -> list[dict]:
    """Return the valid rows of a log; empty if there is no file. A killed process may leave an incomplete last line."""
    try:
        values = [value for _, value in json_lines(path)]
    except OSError:
        return []
    return [value for value in values if isinstance(value, dict) and isinstance(value.get("step"), int)]


class LogWriter:
    """Append rows to a run's log.

    If the run resumes from `step`, existing rows of later steps are removed first; if `step` is 0, all existing rows.
    The attribute `kept` holds the remaining rows.
    """

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
        """Close the file; raise an `OSError` if rows that could not be written earlier still cannot be written."""
        with self._named():
            self.file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Add the log's path to an `OSError` raised inside this context; the error for a full disk has no path."""
        try:
            yield
        except OSError as error:
            error.filename = self.file.name
            raise


def of_split(rows: Iterable[dict], split: str) -> list[dict]:
    """Return the rows of one split, `train` or `validation`."""
    return [row for row in rows if row.get("split") == split]
