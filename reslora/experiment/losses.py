"""Compare methods by losses from any trainer."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidArgument, refused_as
from .record import Ranking, Verdict
from .verdicts import ALL, Words, conclude

COLUMNS = ("method", "seed", "item", "loss")


class LossComparison(NamedTuple):
    """The result of `compare_losses`."""

    verdicts: list[Verdict]
    """A verdict on each method other than the reference: dictionaries with the keys of `reslora.experiment.Verdict`."""
    ranking: Ranking | None
    """The best methods, and by how much the others are worse; None unless all pairs are compared."""


class Losses(NamedTuple):
    """Losses of methods with names of their seeds and items."""

    arrays: dict[str, np.ndarray]
    """Losses of each method, of shape (seeds, items)."""
    seeds: Sequence[str]
    items: Sequence[str]
    groups: Sequence[str]
    """Group of each item; empty without groups."""


def compare_losses(
    losses: Mapping[str, ArrayLike] | str | Path,
    reference: str | None = None,
    against: str = ALL,
    groups: Sequence[str] = (),
    evaluations: int = 1,
    unit: str = "item",
    fixed_runs: bool = False,
) -> LossComparison:
    """Compare methods by test losses of any trainer, for new seeds and new test items. A lower loss is better.

    `losses`: by method, an array of shape (seeds, items); every method has the same seeds and items, in the same order.
    Or a CSV file with the columns method, seed, item, loss, and optionally group. `reference`: the method with which
    the others are compared (default: the first one). `against`: "all" to compare all pairs and find the best methods,
    "reference" to compare with the reference only, which shows smaller differences. `groups`: the group of each item,
    if items come in groups that resemble each other; verdicts then need six groups. `evaluations`: how often the items
    have been used for a comparison, for example as seeds were added; every time has a stricter significance level.
    `unit`: the word for an item in sentences. `fixed_runs`: compare these very runs for new items, which one seed is
    enough for; the result then says nothing about another training of the same method.

    Raises `InvalidArgument`, a `ValueError`, if losses are missing, not finite, or not above zero.
    """
    found = read_losses(Path(losses)) if isinstance(losses, str | Path) else of_arrays(losses)
    arrays = found.arrays
    if len(arrays) < 2:
        raise InvalidArgument("losses", f"{len(arrays)} method", "give at least two")
    reference = reference or next(iter(arrays))
    if reference not in arrays:
        raise InvalidArgument(f"reference {reference}", "is not a method", f"give one of {', '.join(arrays)}")
    if against not in (ALL, "reference"):
        raise InvalidArgument(f"against {against}", "is not known", 'give "all" or "reference"')
    groups = [*map(str, groups)] or found.groups
    if len(groups) not in (0, len(found.items)):
        problem = f"{len(groups)} groups of {len(found.items)} items"
        raise InvalidArgument("groups", problem, "give a group for each item")
    for label, values in arrays.items():
        if not (np.isfinite(values) & (values > 0)).all():
            seed, item = np.argwhere(~(np.isfinite(values) & (values > 0)))[0]
            where = f"method {label}, seed {found.seeds[seed]}, item {found.items[item]}"
            raise InvalidArgument(where, f"the loss is {values[seed, item]:g}", "give finite losses above zero")
    words = Words(unit, {}, found.seeds, found.items, groups)
    references = {label: reference for label in arrays if label != reference}
    return LossComparison(*conclude(arrays, references, {}, against, words, evaluations, {}, fixed_runs)[:2])


def of_arrays(losses: Mapping[str, ArrayLike]) -> Losses:
    """Return losses from arrays; raises `InvalidArgument` for shapes other than (seeds, items), or different ones."""
    with refused_as("losses", "give an array of numbers for each method"):
        arrays = {label: np.asarray(values, float) for label, values in losses.items()}
    shape = next((array.shape for array in arrays.values()), (0, 0))
    for label, array in arrays.items():
        if array.shape != shape or array.ndim != 2 or 0 in shape:
            problem = f"has losses of shape {array.shape}"
            raise InvalidArgument(f"method {label}", problem, "give each method the shape (seeds, items)")
    return Losses(arrays, [*map(str, range(shape[0]))], [*map(str, range(shape[1]))], ())


def read_losses(path: Path) -> Losses:
    """Return the losses in a CSV file; raises `InvalidArgument` for missing columns or cells, and for duplicates."""
    with refused_as(str(path), "give a CSV file with the columns method, seed, item, loss"):
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        rows = list(reader)
    if lacking := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise InvalidArgument(str(path), f"has no column {', '.join(lacking)}", f"give {', '.join(COLUMNS)}")
    names = [list(dict.fromkeys(row[column] for row in rows)) for column in COLUMNS[:3]]
    places = [{name: place for place, name in enumerate(each)} for each in names]
    cells, groups = np.full([len(each) for each in names], np.nan), dict[str, str]()
    for line, row in enumerate(rows, 2):
        place = tuple(each[row[column]] for each, column in zip(places, COLUMNS, strict=False))
        with refused_as(f"{path} line {line}", "give a number as the loss"):
            loss = float(row["loss"])
        if not np.isfinite(loss) or not np.isnan(cells[place]):
            problem = f"the loss is {loss:g}" if not np.isfinite(loss) else "the same method, seed and item again"
            raise InvalidArgument(f"{path} line {line}", problem, "correct it, or remove the line")
        cells[place] = loss
        if groups.setdefault(row["item"], row.get("group") or "") != (row.get("group") or ""):
            raise InvalidArgument(f"{path} line {line}", f"item {row['item']} has two groups", "give it one")
    if np.isnan(cells).any():
        missing = " ".join(each[place] for each, place in zip(names, np.argwhere(np.isnan(cells))[0], strict=True))
        problem = f"{int(np.isnan(cells).sum())} losses are missing, such as that of {missing}"
        raise InvalidArgument(str(path), problem, "give a loss for every method, seed and item")
    if any(groups.values()) and not all(groups.values()):
        lacking_group = next(item for item, group in groups.items() if not group)
        raise InvalidArgument(str(path), f"item {lacking_group} has no group", "fill in the column for every item")
    return Losses(dict(zip(names[0], cells, strict=True)), names[1], names[2], [*filter(None, groups.values())])
