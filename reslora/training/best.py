"""Save the adapter with the lowest validation loss (--save_best), and detect when the loss stops improving.

`<method>/best/step-<n>` contains an adapter and its validation loss. When a better adapter is saved, the earlier one
remains until the next checkpoint is written. Therefore, from whichever checkpoint a run resumes, the best adapter up to
that checkpoint exists. After the last step, `best/` may also contain averages of checkpoints (`averaging.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..io import read_object, remove, replacing, temporary_beside, write_checksums, write_json
from ..methods.adapters import save_adapter
from ..runtime.checkpoint_folders import discard
from ..runtime.log import of_split, read_log
from .embeddings import save_embeddings
from .state import Learner

FOLDER, RECORD = "best", "loss.json"


@dataclass(frozen=True)
class Best:
    """A saved adapter and its validation loss: the best adapter up to its step, or an average of checkpoints."""

    path: Path
    step: int
    loss: float
    average: str = ""
    """Notation of the average of checkpoints, such as `ema:0.99`; empty for the adapter of a single step."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the averaged checkpoints."""

    def __str__(self) -> str:
        """Return a phrase that names the adapter in messages, such as `of step 100`."""
        if not self.average:
            return f"of step {self.step}"
        return f"{self.average} of the checkpoints of steps {', '.join(map(str, self.checkpoints))}"

    def to_dict(self) -> dict:
        """Return its JSON record."""
        record = {"step": self.step, "loss": self.loss}
        return record | ({"average": self.average, "checkpoints": self.checkpoints} if self.average else {})


def all_best(folder: Path) -> list[Best]:
    """Return the saved best adapters of a method, newest first."""
    return sorted(_saved(folder, "step-*"), key=lambda best: best.step, reverse=True)


def averages_at(folder: Path, step: int) -> list[Best]:
    """Return the saved averages of checkpoints from a training that finished at `step`."""
    return [best for best in _saved(folder, "[!.]*") if best.average and best.step == step]


def _saved(folder: Path, pattern: str) -> list[Best]:
    found = [(path, read_object(path / RECORD)) for path in sorted((folder / FOLDER).glob(pattern))]
    return [Best(path, **record) for path, record in found if record]


def best_of(folder: Path) -> Best | None:
    """Return the saved adapter with the lowest loss, which is the newest one; None without any."""
    return next(iter(all_best(folder)), None)


def to_export(folder: Path, step: int) -> Best | None:
    """Return the adapter that --save_best exports after `step` steps; None without any.

    The exported adapter is the best one, or an average of checkpoints whose loss is lower.
    """
    candidates = [best for best in (best_of(folder), *averages_at(folder, step)) if best and math.isfinite(best.loss)]
    return min(candidates, key=lambda best: best.loss, default=None)


def keep_if_best(learner: Learner, folder: Path, loss: float) -> None:
    """Save the adapters if `loss` is lower than the loss of all saved ones."""
    before = best_of(folder)
    if loss < (before.loss if before else math.inf):
        path = folder / FOLDER / f"step-{learner.step:06d}"
        keep_adapter(learner, path, {"step": learner.step, "loss": loss})


def keep_adapter(learner: Learner, path: Path, record: dict | None = None) -> None:
    """Write the learner's present adapters to `path`, in the format of a checkpoint.

    `record`: step and loss, which are written to `loss.json`; without it, the folder has no checksums either.
    """
    with replacing(path) as temporary:
        temporary.mkdir()
        for place, part in learner.trained.places(temporary):
            save_adapter(part, place)
        save_embeddings(learner.trained, temporary)
        if record:
            write_json(temporary / RECORD, record)
            write_checksums(temporary)


def forget_beaten(folder: Path) -> None:
    """Remove all saved best adapters except the newest, which has the lowest loss."""
    for best in all_best(folder)[1:]:
        discard(best.path)


def go_on_from(folder: Path, step: int) -> None:
    """Remove the best adapters and averages of later steps than `step`, at which a run resumes.

    Prints a line if the best adapter up to that step is missing.
    """
    for best in _saved(folder, "[!.]*"):
        if best.step > step:
            remove(best.path.rename(temporary_beside(best.path)))
    rows = of_split(read_log(folder / "log.jsonl"), "validation")
    before = min((row for row in rows if 0 < row["step"] <= step), key=lambda row: row["loss"], default=None)
    kept = best_of(folder)
    if before and (kept is None or before["loss"] < kept.loss):
        print(
            f"{folder}: the adapter of step {before['step']}, the best before step {step}, is missing: "
            "--save_best stores the best of the later steps",
            flush=True,
        )


def is_over(losses: Sequence[float], patience: int | None) -> bool:
    """Return whether none of the last `patience` losses is lower than the lowest earlier one."""
    if patience is None or len(losses) <= patience:
        return False
    return min(losses[-patience:]) >= min(losses[:-patience])
