"""What a run tells while it trains: the log, the trackers, samples, validation loss."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from ...common.errors import Diverged, Stopped
from ...common.log import LogWriter, read_log
from ...common.signals import StopRequest
from ...common.together import decided
from ...files import replacing
from ..data.samples import Material, ValidationSamples
from ..training.denoising import DenoisingLoss, evaluating
from ..training.schedule import Schedule
from ..training.state import Learner
from .drawing import Drawer, as_image

VALIDATION_PARTS = ("loss", "samples")


class Reports:
    """The log and the trackers of one method."""

    def __init__(self, folder: Path, learner: Learner, schedule: Schedule, accelerator: Accelerator) -> None:
        self.learner, self.folder, self.trackers = learner, folder, accelerator.trackers
        # TensorBoard alone takes the steps of the next method from 0 again.
        self.before = learner.before * (schedule.steps + 1)
        self.log = LogWriter(folder / "log.jsonl", learner.step) if accelerator.is_main_process else None
        self.noted: dict | None = None

    def note(self, split: str, loss: torch.Tensor | float) -> None:
        """Keeps a row of the log for `flush`: to read a loss at once is to wait for the device at every step."""
        learner = self.learner
        rate, seconds = learner.lr_scheduler.get_last_lr()[0], round(learner.seconds, 3)
        self.noted = {"step": learner.step, "split": split, "loss": loss, "lr": rate, "seconds": seconds}

    def flush(self) -> float | None:
        """Writes what is noted, to the log and the trackers; returns its loss, or raises `Diverged` if not finite."""
        row, self.noted = self.noted, None
        if row is None:
            return None
        row["loss"] = float(row["loss"])
        self._write(**row)
        return row["loss"]

    def _write(self, step: int, split: str, loss: float, lr: float, seconds: float) -> None:
        name = self.learner.name
        if not math.isfinite(loss):
            raise Diverged(
                f"{name}: {split} loss {loss} at step {step}; checkpoints before it are intact: go on from one, or "
                "start in another --output_dir with a lower --learning_rate"
            )
        if self.log:
            self.log.write({"step": step, "split": split, "loss": loss, "lr": lr, "seconds": seconds})
        values = {f"{split}_loss/{name}": loss, f"lr/{name}": lr}
        for tracker in self.trackers:
            if tracker.name != "tensorboard":
                tracker.log(values, step=step + self.before)
            elif self.log:  # accelerate's own `log` waits for the disk every time
                for tag, value in values.items():
                    tracker.writer.add_scalar(tag, value, step)

    def samples(self, images: Sequence[Image.Image], per_prompt: int) -> None:
        """The samples of this step, as files and to trackers that show images."""
        save_images(self.folder / "samples" / f"step-{self.learner.step:06d}", images, per_prompt)
        name, step = f"samples/{self.learner.name}", self.learner.step
        for tracker in self.trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: images}, step=step + self.before)
            if tracker.name == "tensorboard":
                stacked = np.stack([np.asarray(image) for image in images])
                tracker.writer.add_images(name, stacked, step, dataformats="NHWC")

    def close(self) -> None:
        """Writes what is still noted, and closes the log."""
        try:
            self.flush()
        finally:
            if self.log:
                self.log.close()
                for tracker in self.trackers:
                    if tracker.name == "tensorboard":
                        tracker.writer.flush()

    def overdue(self, schedule: Schedule) -> list[str]:
        """The parts of the validation that are still missing at the step from which training goes on.

        A run may have been stopped before the validation of that step, or within it.
        """
        step = self.learner.step
        rows = read_log(self.folder / "log.jsonl")
        done = {
            "loss": any(row["step"] == step and row["split"] == "validation" for row in rows),
            "samples": (self.folder / "samples" / f"step-{step:06d}").is_dir(),
        }
        due = step == 0 or schedule.is_due(step)
        return [part for part in VALIDATION_PARTS if step == 0 or not done[part]] if due else []


class Validation:
    """Validation loss and samples of a denoiser, on the main process."""

    def __init__(
        self, loss: DenoisingLoss, material: Material, drawer: Drawer, accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.loss, self.material, self.drawer = loss, material, drawer
        self.accelerator, self.stop = accelerator, stop

    def __call__(self, learner: Learner, reports: Reports, parts: Sequence[str] = VALIDATION_PARTS) -> None:
        """Measures and draws; samples that a stop cuts short are drawn when the run goes on."""
        with learner.averaged():
            decided(lambda: self._measure_and_draw(learner, reports, parts))

    def _measure_and_draw(self, learner: Learner, reports: Reports, parts: Sequence[str]) -> None:
        if "loss" in parts and self.material.held_out:
            reports.note("validation", self.mean_loss(learner.denoiser))
            reports.flush()
        flags = self.material.flags
        if "samples" in parts and flags.validation_prompt and flags.num_validation_images:
            self._draw(learner, reports)

    def mean_loss(self, denoiser: nn.Module) -> float:
        """Mean unweighted loss on the held-out images, with the same noise and timesteps at every call."""
        samples = ValidationSamples(self.material)
        with evaluating(denoiser, *self.loss.encoders), torch.no_grad(), self.accelerator.autocast():
            losses = [self.loss(denoiser, batch, weighted=False) for batch in samples.batches()]
        return torch.cat(losses).mean().item()

    def _draw(self, learner: Learner, reports: Reports) -> None:
        flags, prompts = self.material.flags, self.material.flags.validation_prompt

        try:
            with self.accelerator.autocast():
                drawn = self.drawer.draw(learner.denoiser, prompts, flags.num_validation_images, self._leave_if_asked)
        except Stopped:
            return
        if not all(np.isfinite(image).all() for image in drawn):
            self.accelerator.print(f"warning: samples of step {learner.step} have pixels that are not finite")
        reports.samples([as_image(image) for image in drawn], flags.num_validation_images)

    def _leave_if_asked(self) -> None:
        self.stop.check("stopped while drawing")


def save_images(folder: Path, images: Sequence[Image.Image], per_prompt: int) -> None:
    """`<prompt>-<image>.png`, numbered from zero, in a folder that is whole or not there."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        for number, image in enumerate(images):
            image.save(temporary / f"{number // per_prompt}-{number % per_prompt}.png")


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None
