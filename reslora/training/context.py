"""The context of a run: resolved options, model, processes and stop requests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from ..options.images import Options
from ..runtime.signals import StopRequest
from ..runtime.status import Status

if TYPE_CHECKING:
    from ..images.initial_lora import Start
    from ..images.model.families.base import Part
    from ..images.model.loading import Model


@dataclass(frozen=True)
class Context:
    """Options with all defaults resolved, the model, the processes, and stop requests.

    Each arm of an experiment, that is a run of it, has its own context. Its `options` are those of the arm, `place` is
    the arm's directory inside the method's directory, and `before` is the number of arms before it.
    """

    options: Options
    model: Model
    accelerator: Accelerator
    stop: StopRequest
    place: str = ""
    before: int = 0
    start: Start | None = None
    """The LoRA file that training starts from."""
    assistant: Start | None = None
    """The LoRA file that is active only in training."""
    status: Status = field(default_factory=Status)
    """Writer of the current phase, which the application shows."""

    @property
    def folder(self) -> Path:
        """Output directory of the run."""
        return Path(self.options.output.output_dir)

    @functools.cached_property
    def print_once(self) -> Callable[[str], object]:
        """A function that prints a line unless it has printed it before: several checks can produce the same line."""
        return functools.cache(self.accelerator.print)

    def name_of(self, method: str) -> str:
        """Return a method's directory relative to the output directory, with `place` for an arm of an experiment."""
        return f"{method}/{self.place}" if self.place else method

    def folder_of(self, method: str) -> Path:
        """Return the directory of a method."""
        return self.folder / self.name_of(method)

    @property
    def writes_merged(self) -> bool:
        """Whether to export merged weights; in an experiment only if --merged_weights is given."""
        return not self.place or self.options.experiment.merged_weights

    @property
    def encoders(self) -> tuple[Part, ...]:
        """Text encoders that are trained."""
        return self.model.family.trainable if self.options.adapter.train_text_encoder else ()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return weight_dtype(self.accelerator.mixed_precision)


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of the frozen weights."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
