"""The merges by name: a new one is a function in `merging.py` and a row here; torch is not imported before one runs."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .merging import Factors, Merged


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge: what it computes, and what it must know before."""

    function: str
    """Its name in `merging.py`; takes a chain, front to back, and gives one result for each block."""
    needs_norms: bool = False
    """Whether it needs f_n of every block."""
    needs_moments: bool = False
    """Whether it needs calibration, with the second moments of every block's input."""
    max_rank: int | None = None
    """Merged blocks of a higher rank are cut to this one."""

    def __call__(self, chain: list[Factors]) -> list[Merged]:
        """Merge a chain."""
        merging = importlib.import_module(".merging", __package__)
        results = getattr(merging, self.function)(chain)
        if self.max_rank is None:
            return results
        return [merging.cut(block, result, self.max_rank) for block, result in zip(chain, results, strict=True)]


MERGES = {
    "none": Merge("merge_none"),
    "input": Merge("merge_input", needs_norms=True),
    "weights": Merge("merge_weights"),
    "lstsq": Merge("merge_lstsq", needs_moments=True),
}
"""A shortcut may have others (`reslora.shortcuts`)."""

AUTO = "auto"
"""Whichever keeps most of what there is to go by."""

NAMES = (AUTO, *MERGES)
