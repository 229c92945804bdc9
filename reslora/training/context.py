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

    Each arm of an experiment has its own, with its options, its place inside the method's directory, and the number of
    arms before its method's.
    """

    options: Options
    model: Model
    accelerator: Accelerator
    stop: StopRequest
    place: str = ""
    before: int = 0
    start: Start | None = None
    """The LoRA file that training starts from."""
    status: Status = field(default_factory=Status)
    """Current phase, for the application."""

    @property
    def folder(self) -> Path:
        """Output directory of the run."""
        return Path(self.options.output.output_dir)

    @functools.cached_property
    def print_once(self) -> Callable[[str], object]:
        """Print a line unless it was printed before: several checks can produce the same line."""
        return functools.cache(self.accelerator.print)

    def name_of(self, method: str) -> str:
        """Return the directory of a method, relative to the run's: its name, and the arm's place."""
        return f"{method}/{self.place}" if self.place else method

    def folder_of(self, method: str) -> Path:
        """Return the directory of a method."""
        return self.folder / self.name_of(method)

    @property
    def writes_merged(self) -> bool:
        """Whether merged weights are exported; for the arms of an experiment only on request."""
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
