"""The interface of a study to the training loop, and the content hashes that identify its data and model."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .context import Context
from .reports import Reports
from .schedule import Schedule
from .state import Learner


@dataclass(frozen=True)
class Identity:
    """Content hashes of the data and model of a run, which a resumed run must match."""

    model: str
    images: str
    model_flag: str
    """The option that names the model, and its value, for messages."""
    images_flag: str
    class_images_flag: str = ""
    lora: str = ""
    """Hash of the LoRA that training starts from; empty without one."""
    lora_flag: str = ""
    assistant: str = ""
    """Hash of the LoRA that is active only in training; empty without one."""
    assistant_flag: str = ""


@dataclass(frozen=True)
class Study(ABC):
    """A run's options, data and model. The model of a `Learner` is called with a batch that `batches` yields."""

    schedule: Schedule
    identity: Identity
    """Content hashes of model and data, which a resumed run must match."""
    context: Context

    @abstractmethod
    def learner(self, method: str) -> Learner:
        """Return the model with a new adapter, initialized from the seed."""

    @abstractmethod
    def batches(self, steps: range) -> Generator:
        """Yield this process's batches of these steps; a batch depends only on the seed, the step and the process."""

    def passes(self, step: int) -> int:
        """Return the number of batches of a step."""
        return self.context.options.training.gradient_accumulation_steps

    def count(self, batch: Any) -> int | None:
        """Return the number of losses that the model returns for a batch; a step's loss is the mean over all of them.

        None if all batches have the same number. Then the loss is the mean of the batches' means.
        """
        return None

    def before_training(self, learner: Learner) -> None:  # noqa: B027 - not every model needs it
        """Prepare a restored model before accelerate wraps it."""

    @abstractmethod
    def calibration(self) -> Iterable:
        """Return the training batches on which a control method is calibrated."""

    @property
    def example_inputs(self) -> dict | None:
        """Keyword arguments to trace the model with; None for those that `reslora.connect` makes."""
        return None

    def calibrate(self, learner: Learner, batch: Any) -> None:
        """Run a forward pass of a calibration batch."""
        learner.trained(batch)

    @abstractmethod
    def reports(self, learner: Learner) -> contextlib.AbstractContextManager[Reports]:
        """Return a context manager of the log and the trackers of a method."""

    @abstractmethod
    def validate(self, learner: Learner, reports: Any, parts: Sequence[str] | None = None) -> None:
        """Measure the validation loss, generate samples, and set `learner.over`.

        `parts`: which of "loss" and "samples" to compute; both if None.
        """

    def sample(self, learner: Learner, reports: Any, prompts: str) -> None:  # noqa: B027 - not every model generates
        """Generate samples of other prompts, one per line, with the learner's present weights."""

    @abstractmethod
    def validation_loss(self, learner: Learner) -> float | None:
        """Return the mean loss on the held-out images with the learner's present weights, in every process.

        Returns None if a stop request interrupts it.
        """

    @abstractmethod
    def export(self, learner: Learner, schedule: Schedule) -> dict[str, float]:
        """Write the trained method's files. Every process calls this.

        Returns, for each file that was read back, the largest relative difference of a layer from the merged model.
        """
