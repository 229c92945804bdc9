"""Registry of the merge methods; their functions are in `merging.py`.

`Merge` imports them, and thereby torch, when it is called, so that `--help` appears at once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .merging import Factors, Merged


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge method: its function and the statistics that it needs."""

    function: str
    """Name of the function in `merging.py`; it takes the blocks of a chain and returns a `Merged` for each."""
    needs_norms: bool = False
    """Whether the method needs the norm f_n of every block."""
    needs_moments: bool = False
    """Whether the method needs calibration, with the second moments of every block's input."""
    max_rank: int | None = None
    """Maximum rank of merged blocks; None: no limit."""

    def __call__(self, chain: list[Factors]) -> list[Merged]:
        """Return the merged blocks of a chain, front to back."""
        from . import merging

        results = getattr(merging, self.function)(chain)
        if self.max_rank is None:
            return results
        return [merging.cut(block, result, self.max_rank) for block, result in zip(chain, results, strict=True)]


MERGES = {
    "none": Merge("merge_none"),
    "input": Merge("merge_input", needs_norms=True),
    "weights": Merge("merge_weights_input"),
    "lstsq": Merge("merge_lstsq", needs_moments=True),
}
"""Merge methods by name; a shortcut may define others (`reslora.shortcuts`)."""

AUTO = "auto"
"""Name that stands for the most accurate method that the available statistics allow."""

NAMES = (AUTO, *MERGES)
