"""Split images or examples into training, selection and test parts, by a hash of their content."""

import math
from collections.abc import Sequence

from ..seeds import derive

SPACE = 2**63  # range of `derive`
LEAST = 2  # minimum size of a part: a single item has no variance
FEW, ENOUGH = 6, 10  # few items in the test part, and enough
LARGEST = 0.5  # largest recommended fraction


def cut(marks: Sequence[str], select: float, test: float) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of the training, selection and test parts.

    A hash of each mark is a number from 0 to 1. Items below `test` are tested on, and the next ones, up to `test` +
    `select`, are for selection. Unless its fraction is 0, each part has at least one item, or LEAST if two remain to
    train on.
    """
    places = [derive("experiment", mark) / SPACE for mark in marks]
    order = sorted(range(len(marks)), key=places.__getitem__)
    least = int(select > 0)
    some = max(1, min(LEAST, len(marks) - 2 - least)) if test > 0 else 0
    tested = min(max(some, sum(place < test for place in places)), len(marks) - 1 - least)
    chosen = min(max(least, sum(test <= place < test + select for place in places)), len(marks) - 1 - tested)
    return order[tested + chosen :], order[tested : tested + chosen], order[:tested]


def enough_of(marks: Sequence[str]) -> float:
    """Return the fraction, in hundredths, with which the test part has ENOUGH items; 1 if there are not enough."""
    places = sorted(derive("experiment", mark) / SPACE for mark in marks)
    return (math.floor(100 * places[ENOUGH - 1]) + 1) / 100 if len(places) > ENOUGH else 1


def too_few(tested: int, unit: str, enough: float = 1) -> list[str]:
    """Return a warning if the test part is too small to show a difference, with the fix; `enough` is a fraction."""
    if tested >= FEW:
        return []
    wider = f", or with --test_split {enough:g}" if enough <= LARGEST else ""
    number = f"{tested} {unit}s compare" if tested > 1 else f"1 {unit} compares"
    return [f"only {number}: so few seldom show that a difference is real; begin anew with more {unit}s{wider}"]
