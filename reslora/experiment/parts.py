"""What is trained on, what chooses rates and checkpoints, and what compares methods: by a hash of content."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.seeds import derive

SPACE = 2**63  # of `derive`


def cut(marks: Sequence[str], select: float, test: float) -> tuple[list[int], list[int], list[int]]:
    """Numbers of what is trained on, chosen by and tested on: a hash of each mark is a place from 0 to 1, and those
    below `test` are tested on, those above it by less than `select` chosen by; at least one unless a share is 0."""
    places = [derive("experiment", mark) / SPACE for mark in marks]
    order = sorted(range(len(marks)), key=places.__getitem__)
    least = int(select > 0)
    tested = min(max(int(test > 0), sum(place < test for place in places)), len(marks) - 1 - least)
    chosen = min(max(least, sum(test <= place < test + select for place in places)), len(marks) - 1 - tested)
    return order[tested + chosen :], order[tested : tested + chosen], order[:tested]
