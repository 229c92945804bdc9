"""The adapter with the lowest validation loss so far, kept by --save_best, and how long there has been none better.

`<method>/best/step-<n>` holds the adapters as they were measured, and their loss. One that a later one has beaten stays
until there is a checkpoint after both: whatever checkpoint a run goes on from, the best up to it is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...common.adapters import save_adapter
from ...common.log import of_split, read_log
from ...common.recovery import discard
from ...files import read_object, remove, replacing, temporary_beside, write_checksums, write_json
from .state import Learner

FOLDER, RECORD = "best", "loss.json"


@dataclass(frozen=True)
class Best:
    """An adapter that was the best one when it was measured."""

    path: Path
    step: int
    loss: float


def all_best(folder: Path) -> list[Best]:
    """Those that a method has kept, the newest first."""
    found = [(path, read_object(path / RECORD)) for path in (folder / FOLDER).glob("step-*")]
    kept = [Best(path, record["step"], record["loss"]) for path, record in found if record]
    return sorted(kept, key=lambda best: best.step, reverse=True)


def best_of(folder: Path) -> Best | None:
    """Return the best one so far."""
    return next(iter(all_best(folder)), None)


def keep_if_best(learner: Learner, folder: Path, loss: float) -> None:
    """Keep the adapters as they are, if no loss before was as low."""
    before = best_of(folder)
    if loss < (before.loss if before else math.inf):
        path = folder / FOLDER / f"step-{learner.step:06d}"
        keep_adapter(learner, path, {"step": learner.step, "loss": loss})


def keep_adapter(learner: Learner, path: Path, record: dict | None = None) -> None:
    """Write the adapters as they are at this step, as a checkpoint has them."""
    with replacing(path) as temporary:
        temporary.mkdir()
        for place, part in learner.trained.places(temporary):
            save_adapter(part, place)
        if record:
            write_json(temporary / RECORD, record)
            write_checksums(temporary)


def forget_beaten(folder: Path) -> None:
    """Once a checkpoint is written, the best one before it is all that is needed."""
    for best in all_best(folder)[1:]:
        discard(best.path)


def go_on_from(folder: Path, step: int) -> None:
    """Those after the step that a run goes on from go: it will find them again. Says if the best before is gone."""
    for best in all_best(folder):
        if best.step > step:
            remove(best.path.rename(temporary_beside(best.path)))
    rows = of_split(read_log(folder / "log.jsonl"), "validation")
    before = min((row for row in rows if 0 < row["step"] <= step), key=lambda row: row["loss"], default=None)
    kept = best_of(folder)
    if before and (kept is None or before["loss"] < kept.loss):
        print(
            f"{folder}: the adapter of step {before['step']}, the best before step {step}, is gone: --save_best keeps "
            "the best from here on",
            flush=True,
        )


def is_over(losses: Sequence[float], patience: int | None) -> bool:
    """Return whether the last `patience` of the losses are no lower than the lowest before."""
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
