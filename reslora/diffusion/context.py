"""What every stage of a run may read, settled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from ..common.signals import StopRequest
from ..common.status import Status
from ..options.images import Options

if TYPE_CHECKING:
    from .model.families.base import Part
    from .model.loading import Model
    from .training.start import Start


@dataclass(frozen=True)
class Context:
    """The options with every default filled in, the model, the processes, and requests to stop.

    An arm of an experiment has one of its own: its options, its place inside the method's folder, and how many others
    there are before its method's.
    """

    options: Options
    model: Model
    accelerator: Accelerator
    stop: StopRequest
    place: str = ""
    before: int = 0
    start: Start | None = None
    """The LoRA that training goes on from."""
    status: Status = field(default_factory=Status)
    """What is told of where the run is."""

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.options.output.output_dir)

    @functools.cached_property
    def tell_once(self) -> Callable[[str], object]:
        """Prints a line that was not printed yet: what is checked several times may say the same of it."""
        return functools.cache(self.accelerator.print)

    def name_of(self, method: str) -> str:
        """Where a method writes, inside the folder: its name, and that of the arm."""
        return f"{method}/{self.place}" if self.place else method

    def folder_of(self, method: str) -> Path:
        """Where a method writes."""
        return self.folder / self.name_of(method)

    @property
    def writes_merged(self) -> bool:
        """Whether merged weights are exported: of an experiment's arms, which are many, where that is asked for."""
        return not self.place or self.options.experiment.merged_weights

    @property
    def encoders(self) -> tuple[Part, ...]:
        """The text encoders that train."""
        return self.model.family.trainable if self.options.adapter.train_text_encoder else ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts."""
        return weight_dtype(self.accelerator.mixed_precision)


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """Return the dtype of the frozen parts."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
