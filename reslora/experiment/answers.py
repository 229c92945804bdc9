"""Answers for programs and papers: whether a claim is shown, and a table of all results.

Both answers are read from the folder of an experiment, from the folder of a comparison of LoRA files, or from a CSV
file with losses from any trainer (`losses.read_losses`).
"""

import argparse
import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InvalidArgument, refused_as
from ..formatting import pluralize
from ..io import read_object
from ..options.argument_parser import did_you_mean
from ..options.option import whole
from .choice import is_chosen
from .losses import compare_losses, read_losses
from .record import EXPERIMENT, FORMAT, Experiment, TestLosses, Verdict
from .report import start_in_words
from .verdicts import ALL, compare, mean_of, tested

COMPARISON, LOSSES = "comparison.json", "losses.csv"
"""Files of a comparison of LoRA files."""
SHOWN, NOT_SHOWN, OPPOSITE = 0, 1, 3
"""Exit statuses of --check; 2 is bad input."""
MEANING = {SHOWN: "shown", NOT_SHOWN: "not shown", OPPOSITE: "the opposite is shown"}
COLUMNS = (
    "method", "learning_rate", "step", "seeds", "items", "loss", "loss_sd", "reference", "difference", "low", "high",
    "level", "p", "verdict", "detectable",
)  # fmt: skip
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}

Cell = str | int | float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options --check, --table and --evaluations to a parser."""
    add = parser.add_argument_group(
        "answers from the folder of an experiment, or from a CSV file of losses"
    ).add_argument
    # fmt: off
    add("--check", metavar="CLAIM",
        help='test a claim such as "mine < lora": the loss of mine is lower. The exit status is 0 if this is shown, 1 '
             "if it is not, 3 if the opposite is shown, and 2 for bad input")
    add("--table", choices=[*WRITERS], help="print the results of all methods as a table")
    add("--evaluations", type=whole(1), metavar="N",
        help="how often the items of the CSV file have been compared, for example as seeds were added: every time has "
             "a stricter significance level; default: 1")
    # fmt: on


def answer(args: argparse.Namespace, source: Path) -> int:
    """Print what --check or --table requests, and return the exit status."""
    if args.check and args.table:
        raise InvalidArgument(f"--table {args.table}", "not possible with --check", "give one of them")
    if args.evaluations and source.is_dir() and not is_comparison(source):
        raise InvalidArgument(f"--evaluations {args.evaluations}", "an experiment counts them itself", "leave it out")
    if args.table:
        print(table(source, args.table, args.evaluations or 1), end="")
        return 0
    status, sentence = check(source, args.check, args.evaluations or 1)
    print(f"{MEANING[status]}: {sentence}")
    return status


def is_comparison(source: Path) -> bool:
    """Return whether a path is the output folder of a comparison of LoRA files."""
    return (source / COMPARISON).is_file()


class Results(NamedTuple):
    """Test losses and verdicts of a folder or a file."""

    losses: Mapping[str, np.ndarray]
    """Losses of each method, of shape (seeds, items)."""
    verdicts: Sequence[Verdict]
    experiment: Experiment | None = None
    """None for a CSV file."""


def results_of(source: Path, evaluations: int = 1, reference: str = "") -> Results:
    """Return the results in an experiment's folder or in a CSV file.

    `reference`: the method with which the other methods are compared if all pairs are compared (default: the reference
    of the experiment, or the first method of the file). `evaluations`: how often the items of a CSV file have been
    evaluated (`compare_losses`).
    """
    if is_comparison(source):
        files = read_losses(source / LOSSES)
        known, fixed = reference if reference in files.arrays else None, len(files.seeds) == 1
        result = compare_losses(files.arrays, known, ALL, files.groups, evaluations, "image", fixed)
        return Results(files.arrays, result.verdicts)
    if not source.is_dir():
        losses = read_losses(source).arrays
        known = reference if reference in losses else None
        return Results(losses, compare_losses(source, known, evaluations=evaluations).verdicts)
    with refused_as(str(source), "give the output folder of an experiment, or a CSV file"):
        found: Experiment = read_object(source / EXPERIMENT)  # type: ignore[assignment]
        if found.get("format") != FORMAT:
            raise ValueError(f"has no {EXPERIMENT} of this version" if found else f"has no {EXPERIMENT}")
        arms, chosen, base, verdicts = found["arms"], found["chosen"], found.get("base"), found["verdicts"]
        losses = tested(arms, chosen)
        if found.get("ranking") and reference in losses:
            unit, readings = "image" if "timesteps" in found else "example", found.get("readings", 1)
            verdicts = compare(arms, chosen, unit, readings, base, reference, ALL, found.get("family")).verdicts
    return Results(losses, verdicts, found)


def check(source: Path, claim: str, evaluations: int = 1) -> tuple[int, str]:
    """Return the exit status for a claim such as `mine < lora`, and a sentence.

    Significance is corrected for all pairs that the experiment compares, so any number of claims may be checked. Raises
    `InvalidArgument` for methods that are not compared with each other.
    """
    flag = f"--check {claim}"
    one, _, other = (part.strip() for part in claim.partition("<"))
    if not (one and other):
        raise InvalidArgument(flag, "is not a claim", 'give two methods, as "mine < lora"')
    losses, verdicts, experiment = results_of(source, evaluations, other)
    as_of = f" (as of {pluralize(experiment['as_of'], 'run')})" if experiment and "as_of" in experiment else ""
    pairs = [(verdict["label"], verdict["reference"]) for verdict in verdicts]
    for (label, reference), verdict in zip(pairs, verdicts, strict=True):
        if {label, reference} == {one, other}:
            lower = {"better": label, "worse": reference}.get(verdict["conclusion"])
            status = NOT_SHOWN if lower is None else SHOWN if lower == one else OPPOSITE
            return status, verdict["sentence"] + as_of
    known = dict.fromkeys([*losses, *itertools.chain(*pairs)])
    for name in (one, other):
        if name not in known:
            fix = f"give two of {', '.join(known)}" if known else "finish the experiment first"
            raise InvalidArgument(flag, f"{source} has no test losses of {name}{did_you_mean(name, known)}", fix)
    fix = f"give methods that it compares, such as {' < '.join(pairs[0])}" if pairs else "add seeds"
    raise InvalidArgument(flag, f"{source} does not compare {one} with {other}", fix)


def table(source: Path, form: str, evaluations: int = 1) -> str:
    """Return a table with a row for each method, and for the model before training: `csv`, `markdown` or `latex`.

    Losses are means over seeds; `loss_sd` is their standard deviation. The column of the difference is the verdict's
    comparison with the reference, in percent. Other metrics, such as accuracy, have a column each.
    """
    losses, verdicts, experiment = results_of(source, evaluations)
    if not losses:
        raise InvalidArgument(str(source), "has no test losses yet", "finish the experiment first")
    rows: dict[str, dict[str, Cell]] = {}
    for label, array in losses.items():
        means = array.mean(1)[np.isfinite(array).all(1)]
        row = rows[label] = {"method": label, "seeds": len(means), "items": array.shape[1]}
        row["loss"] = float(means.mean()) if len(means) else None
        row["loss_sd"] = float(means.std(ddof=1)) if len(means) > 1 else None
        if experiment:
            chosen, arms = experiment["chosen"], experiment["arms"]
            tests = [arm["test"] for arm in arms if arm["label"] == label and arm["test"] and is_chosen(arm, chosen)]
            row |= {"learning_rate": chosen[label]["learning_rate"], "step": chosen[label]["step"]} | metrics_of(tests)
    for verdict in verdicts:
        low, high = verdict["interval"] or (None, None)
        rows.setdefault(verdict["label"], {"method": verdict["label"]}).update(
            reference=verdict["reference"], difference=verdict["relative"], low=low, high=high,
            level=verdict.get("level"), p=verdict["p_holm"], verdict=verdict["conclusion"],
            detectable=verdict["detectable"],
        )  # fmt: skip
    if experiment and (base := experiment.get("base")):
        name = start_in_words(experiment["settings"])
        rows[name] = metrics_of([base]) | {"method": name, "items": len(base["losses"]), "loss": mean_of(base)}
    columns = [*dict.fromkeys([*COLUMNS, *(name for row in rows.values() for name in row)])]
    return WRITERS[form](columns, [[row.get(column) for column in columns] for row in rows.values()])


def metrics_of(tests: Sequence[TestLosses]) -> dict[str, Cell]:
    """Return the metrics of tests other than the loss, as means."""
    found: dict[str, list[float]] = {}
    for test in tests:
        for name, value in (test.get("similarities", {}) | test.get("figures", {})).items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table as CSV, with all digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table in Markdown."""
    cells = [[formatted(cell).replace("|", "&#124;") for cell in row] for row in (columns, *rows)]
    cells.insert(1, ["---"] * len(columns))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def as_latex(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table in LaTeX, which needs no package."""
    cells = [["".join(LATEX.get(each, each) for each in formatted(cell)) for cell in row] for row in (columns, *rows)]
    head, *lines = (f"{' & '.join(row)} \\\\\n" for row in cells)
    texts = ("method", "reference", "verdict")
    places = "".join("l" if column in texts else "r" for column in columns)
    body = f"\\hline\n{head}\\hline\n{''.join(lines)}\\hline\n"
    return f"\\begin{{tabular}}{{{places}}}\n{body}\\end{{tabular}}\n"


def formatted(cell: Cell) -> str:
    """Return a cell as text, with four digits."""
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


WRITERS = {"csv": as_csv, "markdown": as_markdown, "latex": as_latex}
