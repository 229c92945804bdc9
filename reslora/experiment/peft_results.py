"""Read the results of PEFT's method comparison, and print what one seed can and cannot tell about each pair of runs.

The results are JSON files of https://github.com/huggingface/peft/tree/main/method_comparison, one for each run. A
result file has the mean of a test metric, but not its value for each item, so that runs cannot be compared item by
item.
"""

import csv
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..errors import InvalidArgument, first_line
from ..formatting import enumerated, pluralize, printable
from ..io import replacing
from .statistics import LEVEL

PAIRS = "peft_pairs.csv"
COLUMNS = (
    "task", "run", "other", "metric", "value", "other_value", "difference", "low", "high", "p", "same_runs_new_items",
    "largest_seed_sd",
)  # fmt: skip
MOST_ITEMS = 100_000
"""Largest number of test items that is looked for."""
LEAST_RUNS = 4
"""Least number of runs from whose accuracies the number of test items is found: fewer fit many numbers."""
CANNOT = (
    "Whether the methods differ, one seed cannot tell: another seed moves each result by an unknown amount. The column "
    "'seed SD below' says how small the standard deviation over seeds has to be for the difference to be significant "
    "by itself (5%, without correction for the number of pairs). If it is larger, or the column is empty, the "
    "difference may be chance. The highest of many results is too high on average. Run both with several seeds to find "
    "out."
)


class Run(NamedTuple):
    """The test result of a run."""

    task: str
    """The benchmark, the model and the number of steps, which all compared runs have in common."""
    name: str
    seed: object
    metric: str
    value: float


class Pair(NamedTuple):
    """Two runs of a task, and what their results say."""

    run: Run
    other: Run
    interval: tuple[float, float] | None
    """95% interval of the difference for new test items; None if the number of items is not known."""
    p: float | None
    """p value for new test items, corrected for all pairs of the task (Holm)."""
    seed_sd: float
    """Largest standard deviation over seeds with which the difference would be significant; 0 if none is small enough.
    """

    @property
    def difference(self) -> float:
        """Difference of the values."""
        return self.run.value - self.other.value

    @property
    def verdict(self) -> str:
        """Whether the very same runs differ on new test items."""
        if self.p is None:
            return "not known"
        return "not shown" if self.p >= LEVEL else "higher" if self.difference > 0 else "lower"


def print_peft_results(folder: Path, output: Path, reference: str | None = None) -> None:
    """Print for each task how its runs differ from one of them, and write all pairs to a CSV file in `output`.

    `reference`: name of a run (default: the one with the highest value). Raises `InvalidArgument` for a folder without
    results.
    """
    runs, left_out = read_runs(folder)
    tasks: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: -run.value):
        tasks.setdefault(run.task, []).append(run)
    if reference and reference not in {run.name for run in runs}:
        fix = f"give one of its runs, such as {runs[0].name}"
        raise InvalidArgument(f"--reference {reference}", f"is no run in {folder}", fix)
    pairs = []
    for task, found in sorted(tasks.items()):
        pairs += (own := pairs_of(found))
        for line in lines_of(task, found, own, reference):
            print(printable(line))
        print()
    for line in left_out:
        print(printable(f"left out: {line}"))
    output.mkdir(parents=True, exist_ok=True)
    write_pairs(pairs, output / PAIRS)
    print(CANNOT)
    print(f"all {pluralize(len(pairs), 'pair')}: {output / PAIRS}")


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Return all runs in a folder and its subfolders, and the files that are left out, with the reason."""
    flag, runs, left_out = f"--peft_results {folder}", [], []
    if not folder.is_dir():
        raise InvalidArgument(flag, "no such folder", "give the folder method_comparison of PEFT's repository")
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(content, dict) and {"run_info", "train_info"} <= content.keys()):
                continue
            info, train = content["run_info"], content["train_info"]
            last, config = train["metrics"][-1] if train["metrics"] else {}, info["train_config"]
            metric = next((name for name in last if name.startswith("test ")), None)
            if train["status"] != "success" or metric is None:
                left_out.append(f"{path.name}: {train['status']}, without a test result")
                continue
            place = path.parent.parent if path.parent.name.endswith("results") else path.parent
            task = f"{place.resolve().name}, {config['model_id']}, {pluralize(int(config['max_steps']), 'step')}"
            run = Run(task, str(info["experiment_name"]), config.get("seed"), metric, float(last[metric]))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError) as error:
            left_out.append(f"{path.name}: cannot be read ({first_line(error)})")
            continue
        runs.append(run)
    if not runs:
        raise InvalidArgument(flag, "no result of PEFT's method comparison", "give its folder method_comparison")
    return runs, left_out


def items_of(runs: Sequence[Run]) -> int | None:
    """Return the number of test items: the smallest of which all accuracies are fractions; None if it is not known."""
    values = np.array([run.value for run in runs])
    if len(set(values)) < LEAST_RUNS or not all(run.metric.endswith("accuracy") for run in runs):
        return None
    for number in range(2, MOST_ITEMS):
        counts = values * number
        if np.abs(counts - counts.round()).max() < 1e-7:
            return number
    return None


def pairs_of(runs: Sequence[Run]) -> list[Pair]:
    """Return all pairs of runs of one task.

    Without the answers to each item, a difference is that of independent proportions, with one success and one failure
    added to each (Agresti and Caffo, 2000). Answers of two runs to the same questions are alike, so that the true
    variance is smaller, and the test cautious.
    """
    number, found = items_of(runs), []
    quantile = float(stats.norm.isf(LEVEL / 2))
    for run, other in itertools.combinations(runs, 2):
        one, two = ((each.value * number + 1) / (number + 2) if number else each.value for each in (run, other))
        difference, variance = one - two, (one * (1 - one) + two * (1 - two)) / (number + 2) if number else 0.0
        error = math.sqrt(variance)
        free = (difference / quantile) ** 2 - variance
        interval = (difference - quantile * error, difference + quantile * error) if number else None
        p = float(2 * stats.norm.sf(abs(difference) / error)) if number else None
        found.append(Pair(run, other, interval, p, math.sqrt(max(0.0, free) / 2)))
    return with_holm(found)


def with_holm(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs with p values corrected by Holm's procedure."""
    order = sorted((place for place, pair in enumerate(pairs) if pair.p is not None), key=lambda at: pairs[at].p or 0)
    corrected, largest = list(pairs), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (pairs[place].p or 0)))
        corrected[place] = pairs[place]._replace(p=largest)
    return corrected


def lines_of(task: str, runs: Sequence[Run], pairs: Sequence[Pair], reference: str | None) -> list[str]:
    """Return the lines about a task: a table of the runs compared with one of them, and a summary of all pairs."""
    first = next((run for run in runs if run.name == reference), runs[0])
    number, seeds = items_of(runs), enumerated(sorted({str(run.seed) for run in runs}))
    items = f" of {pluralize(number, 'item')}" if number else ", without the number of items"
    lines = [f"{task}: {pluralize(len(runs), 'run')} with seed {seeds}; {first.metric}{items}"]
    rows = [("run", first.metric, "difference", "95% interval", "these runs, new items", "seed SD below")]
    of_run = {each: pair for pair in pairs if first in pair[:2] for each in pair[:2] if each != first}
    for run in runs:
        if run == first or run not in of_run:
            rows.append((run.name, f"{run.value:.4f}", "", "", "reference" if run == first else "", ""))
            continue
        pair = of_run[run]
        sign = 1 if pair.run == run else -1
        ends = " to ".join(f"{sign * end:+.4f}" for end in (pair.interval or ())[::sign])
        verdict = {"higher": "lower", "lower": "higher"}.get(pair.verdict, pair.verdict) if sign < 0 else pair.verdict
        free = f"{pair.seed_sd:.4f}" if pair.seed_sd else ""
        rows.append((run.name, f"{run.value:.4f}", f"{sign * pair.difference:+.4f}", ends, verdict, free))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shown = sum(pair.verdict in ("higher", "lower") for pair in pairs)
    known = f"{shown} of {pluralize(len(pairs), 'pair')} of these very runs differ on new items (p < 0.05, Holm)"
    unknown = (
        "without results of single items, not even these very runs can be compared on new items; 'seed SD below' is "
        "that of seeds and items together"
    )
    return [*lines, known if number else unknown]


def write_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Write all pairs as CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for pair in pairs:
            run, other = pair.run, pair.other
            ends = pair.interval or ("", "")
            rows.writerow(
                [run.task, run.name, other.name, run.metric, run.value, other.value, pair.difference, *ends,
                 "" if pair.p is None else pair.p, pair.verdict, pair.seed_sd]
            )  # fmt: skip
