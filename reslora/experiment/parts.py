"""What is trained on, what chooses rates and checkpoints, and what compares methods: by a hash of content."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.seeds import derive

SPACE = 2**63  # of `derive`
LEAST = 2  # of one alone nothing tells how much differs from another
FEW, ENOUGH = 6, 10  # that are tested on
LARGEST = 0.5  # share that is advised


def cut(marks: Sequence[str], select: float, test: float) -> tuple[list[int], list[int], list[int]]:
    """Numbers of what is trained on, chosen by and tested on: a hash of each mark is a place from 0 to 1, and those
    below `test` are tested on, those above it by less than `select` chosen by. Unless a share is 0 one at least is
    chosen by and one tested on, and LEAST where two remain to train on."""
    places = [derive("experiment", mark) / SPACE for mark in marks]
    order = sorted(range(len(marks)), key=places.__getitem__)
    least = int(select > 0)
    some = max(1, min(LEAST, len(marks) - 2 - least)) if test > 0 else 0
    tested = min(max(some, sum(place < test for place in places)), len(marks) - 1 - least)
    chosen = min(max(least, sum(test <= place < test + select for place in places)), len(marks) - 1 - tested)
    return order[tested + chosen :], order[tested : tested + chosen], order[:tested]


def enough_of(marks: Sequence[str]) -> float:
    """Return the share that takes ENOUGH to test on, in hundredths; 1 where there are no more."""
    places = sorted(derive("experiment", mark) / SPACE for mark in marks)
    return (math.floor(100 * places[ENOUGH - 1]) + 1) / 100 if len(places) > ENOUGH else 1


def too_few(tested: int, unit: str, enough: float = 1) -> list[str]:
    """Return a line where so few are tested on that hardly anything is shown, with what to do:

    `enough` is a share of all.
    """
    if tested >= FEW:
        return []
    wider = f", or with --test_split {enough:g}" if enough <= LARGEST else ""
    number = f"{tested} {unit}s compare" if tested > 1 else f"1 {unit} compares"
    return [f"only {number}: so few seldom show that a difference is real; begin anew with more {unit}s{wider}"]
