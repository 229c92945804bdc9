"""Split images or examples into training, selection and test parts, by a hash of their content."""

import math
from collections.abc import Sequence

from ..seeds import derive

SPACE = 2**63  # range of `derive`
LEAST = 2  # minimum size of the test part if enough items remain: a single item has no variance
FEW, ENOUGH = 6, 10  # a test part with less than FEW items is too small; one with ENOUGH items is large enough
LARGEST = 0.5  # largest recommended fraction


def cut(marks: Sequence[str], select: float, test: float) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of the training, selection and test parts.

    `marks` identify the items; a hash of each mark is a number from 0 to 1. The test part has the items whose number is
    below the fraction `test`, and the selection part those with a number from `test` to `test` + `select`. Unless the
    fraction of a part is 0, the part has at least one item. The test part has at least LEAST items if two items remain
    to train on.
    """
    places = [derive("experiment", mark) / SPACE for mark in marks]
    order = sorted(range(len(marks)), key=places.__getitem__)
    least = int(select > 0)
    some = max(1, min(LEAST, len(marks) - 2 - least)) if test > 0 else 0
    tested = min(max(some, sum(place < test for place in places)), len(marks) - 1 - least)
    chosen = min(max(least, sum(test <= place < test + select for place in places)), len(marks) - 1 - tested)
    return order[tested + chosen :], order[tested : tested + chosen], order[:tested]


def enough_of(marks: Sequence[str]) -> float:
    """Return the fraction, rounded up to hundredths, with which the test part has ENOUGH items; else 1."""
    places = sorted(derive("experiment", mark) / SPACE for mark in marks)
    return (math.floor(100 * places[ENOUGH - 1]) + 1) / 100 if len(places) > ENOUGH else 1


def too_few(tested: int, unit: str, enough: float = 1) -> list[str]:
    """Return a warning, with the fix, if the test part is too small to show a difference; empty otherwise.

    `enough`: the --test_split with which the test part is large enough (`enough_of`).
    """
    if tested >= FEW:
        return []
    wider = f", or with --test_split {enough:g}" if enough <= LARGEST else ""
    number = f"{tested} {unit}s compare" if tested > 1 else f"1 {unit} compares"
    return [f"only {number}: so few seldom show that a difference is real; begin anew with more {unit}s{wider}"]


def few_to_choose(selected: int, unit: str) -> list[str]:
    """Return a warning if the selection part is too small to choose by; empty otherwise."""
    if selected >= FEW:
        return []
    number = f"{selected} {unit}s choose" if selected > 1 else f"1 {unit} chooses"
    return [f"only {number} learning rates and checkpoints: another one may be better; give a larger --select_split"]
