"""The nine GLUE tasks: columns, labels, metrics, and validation of their rows."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from ..errors import InvalidArgument
from ..json_lines import data_lines

Row = tuple
"""Texts of an example, in the order of the task's columns, and the example's label; the label is None if there is none.
"""


@dataclass(frozen=True)
class Task:
    """Columns, label names and metrics of a task, as on the Hub; the first metric is the paper's."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    """Label names by number; empty for a score from 0 to 5 (STS-B)."""
    metrics: tuple[str, ...] = ("accuracy",)
    parts: tuple[str, ...] = ("",)
    """Suffixes of the validation and test splits: MNLI has two of each."""


ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearmanr")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": Task(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), parts=("_matched", "_mismatched")
    ),
    "qnli": Task(("question", "sentence"), ENTAILMENT),
    "rte": Task(("sentence1", "sentence2"), ENTAILMENT),
    "wnli": Task(("sentence1", "sentence2"), ENTAILMENT[::-1]),
}


def scores(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the task's metrics; an undefined correlation (constant predictions, or a single one) is 0.

    `predictions` and `labels` have shape [examples] and contain label numbers, or scores for STS-B.
    """
    functions: dict[str, Callable] = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda labels, predictions: pearsonr(labels, predictions).statistic if len(labels) > 1 else math.nan,
        "spearmanr": lambda labels, predictions: spearmanr(labels, predictions).statistic,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns about undefined correlations
        values = {name: float(functions[name](labels, predictions)) for name in task.metrics}
    return {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}


def predicted(task: Task, logits: np.ndarray) -> np.ndarray:
    """Return the predicted label numbers, or scores for STS-B, of shape [examples], from logits [examples, labels]."""
    return logits.argmax(-1) if task.labels else logits.reshape(-1)


# -- rows --------------------------------------------------------------------------------------------------------------


def read_folder(task: Task, data_dir: str, split: str) -> tuple[str, list[dict] | None]:
    """Return the name of `<data_dir>/<split>.jsonl` for messages, and its rows (None if the file does not exist)."""
    folder = Path(data_dir)
    path, where = folder / f"{split}.jsonl", f"--data_dir {folder}"
    if not folder.is_dir():
        raise InvalidArgument(where, "no such folder", file_form(task))
    if not path.is_file():
        return f"{where}, {path.name}", None
    rows = []
    for number, row in data_lines(path, f"{where}, {path.name}", "correct it"):
        if not isinstance(row, dict):
            raise InvalidArgument(f"{where}, {path.name} line {number}", "not a JSON object", "correct it")
        rows.append(row)
    return f"{where}, {path.name}", rows


def file_form(task: Task) -> str:
    """Return the required content of a --data_dir, for messages."""
    files = ", ".join(f"validation{part}.jsonl" for part in task.parts)
    columns = ", ".join((*task.columns, "label"))
    return f"give a folder with train.jsonl and {files}, one JSON object a line with {columns}"


def check_rows(task: Task, where: str, rows: list[dict], labelled: bool) -> list[Row]:
    """Return texts and label of each row.

    `labelled`: labels are required. If they are not, labels may be missing in all rows (-1 on the Hub means none).
    Raises `InvalidArgument` naming the first invalid row.
    """
    labelled = labelled or any(row.get("label") not in (None, -1, -1.0) for row in rows)
    names = [*task.columns, *["label"] * labelled]
    found = list(dict.fromkeys(name for row in rows for name in row))
    missing = [name for name in names if name not in found]
    if missing:
        raise InvalidArgument(
            where,
            f"no column {', '.join(missing)}",
            f"the columns are {', '.join(found)}; rename, or change --task_name",
        )
    for number, row in enumerate(rows, 1):
        for name in task.columns:
            if not isinstance(row.get(name), str):
                raise InvalidArgument(
                    f"{where}, row {number}", f"{name} is {row.get(name)!r}, not a text", "correct it"
                )
        if labelled and not valid_label(task, row.get("label")):
            labels = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels)) or "numbers from 0 to 5"
            raise InvalidArgument(f"{where}, row {number}", f"label {row.get('label')!r}", f"labels are {labels}")
    return [(*(row[name] for name in task.columns), row["label"] if labelled else None) for row in rows]


def valid_label(task: Task, label: object) -> bool:
    """Return whether the label is the number of a class, or a score from 0 to 5 for a task without classes."""
    if isinstance(label, bool) or not isinstance(label, (int, float)):
        return False
    return label in range(len(task.labels)) if task.labels else 0 <= label <= 5
