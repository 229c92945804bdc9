"""The log and the trackers of a method in training."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import Diverged
from ..runtime.checkpoint_folders import checkpoints_of
from ..runtime.log import LogWriter, of_split
from .best import is_over
from .schedule import Schedule
from .state import Learner

COLUMNS = ("step", "split", "loss", "lr", "seconds")


class Reports:
    """The log and the trackers of one method."""

    def __init__(self, folder: Path, learner: Learner, schedule: Schedule, accelerator: Accelerator) -> None:
        self.learner, self.folder, self.trackers = learner, folder, accelerator.trackers
        # Trackers other than TensorBoard need increasing steps; theirs continue the steps of earlier methods.
        self.before = learner.before * (schedule.steps + 1)
        self.log = LogWriter(folder / "log.jsonl", learner.step) if accelerator.is_main_process else None
        if self.log:
            self.forget(learner.step)
        self.noted: dict | None = None
        rows = of_split(self.log.kept, "validation") if self.log else []
        self.validated = {row["step"]: row["loss"] for row in rows if row["step"]}
        """The validation losses by step, without the base's loss; only in the main process."""

    def forget(self, step: int) -> None:
        """Remove the files that steps after `step` have written; the log itself removes its rows."""

    def note(self, split: str, loss: torch.Tensor | float, **figures: Any) -> None:
        """Store a row with the scalar `loss` for the log until the next `flush`.

        `flush` converts the loss to a float, because the conversion waits for the device. `figures`: other columns of
        the row, such as `by_timestep`, the loss at each timestep; timestep 1 is pure noise. `lr` is the learning rate
        that the latest step used; before the first step, the learning rate that the first step will use.
        """
        learner = self.learner
        rate = learner.learning_rate if learner.used_rate is None else learner.used_rate
        seconds = round(learner.seconds, 3)
        self.noted = {"step": learner.step, "split": split, "loss": loss, "lr": rate, "seconds": seconds, **figures}

    def flush(self) -> float | None:
        """Write the stored row to the log and the trackers, and return its loss.

        Raises `Diverged` if the loss is not finite.
        """
        row, self.noted = self.noted, None
        if row is None:
            return None
        row["loss"] = float(row["loss"])
        name, split, step, loss = self.learner.name, row["split"], row["step"], row["loss"]
        if not math.isfinite(loss):
            saved = "; checkpoints before it are intact" if checkpoints_of(self.folder) else ""
            advice = f"start in another --output_dir with a lower --learning_rate{saved}"
            raise Diverged(f"{name}: {split} loss {loss} at step {step}", advice)
        if split == "validation" and step:
            self.validated[step] = loss
        at = {f"{split}_loss_at_{timestep}/{name}": value for timestep, value in row.get("by_timestep", {}).items()}
        others = {f"{split}_{figure}/{name}": row[figure] for figure in row if figure not in (*COLUMNS, "by_timestep")}
        self._write(row, {f"{split}_loss/{name}": loss, f"lr/{name}": row["lr"]} | at | others)
        return loss

    def is_over(self, patience: int | None) -> bool:
        """Return whether the last `patience` validations have not lowered the loss; valid only in the main process."""
        return is_over(list(self.validated.values()), patience)

    def _write(self, row: dict, values: dict[str, float]) -> None:
        """Write a row to the log, and values by name to the trackers."""
        step = row["step"]
        if self.log:
            self.log.write(row)
        for tracker in self.trackers:
            if tracker.name != "tensorboard":
                tracker.log(values, step=step + self.before)
            elif self.log:  # accelerate's own `log` flushes to disk every time
                for tag, value in values.items():
                    tracker.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write the stored row, and close the log."""
        try:
            self.flush()
        finally:
            if self.log:
                self.log.close()
                for tracker in self.trackers:
                    if tracker.name == "tensorboard":
                        tracker.writer.flush()

    def overdue(self, schedule: Schedule) -> list[str]:
        """Return ["loss"] if the validation of the step from which training resumes is missing.

        The earlier run may have been stopped before or during the validation after that step.
        """
        step = self.learner.step
        return ["loss"] if step and schedule.is_due(step) and step not in self.validated else []
