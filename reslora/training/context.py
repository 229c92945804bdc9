"""The context of a run: resolved options, model, processes and stop requests."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..options.shared import TrainOptions
from ..runtime.signals import StopRequest
from ..runtime.status import Status


@dataclass(frozen=True)
class Context:
    """Options with all defaults resolved, the model, the processes, and stop requests.

    Each arm (run) of an experiment has its own context. Then `options` are those of the arm, `place` is the arm's
    directory inside the method's directory, and `before` is the number of earlier arms.
    """

    options: TrainOptions
    model: Any
    """The model, as the study loads it."""
    accelerator: Accelerator
    stop: StopRequest
    place: str = ""
    before: int = 0
    status: Status = field(default_factory=Status)
    """Writer of the current phase, which the application shows."""

    @property
    def folder(self) -> Path:
        """Output directory of the run."""
        return Path(self.options.output.output_dir)

    @functools.cached_property
    def print_once(self) -> Callable[[str], object]:
        """A function that prints a line unless the function has printed this line before: several checks can produce
        the same line.
        """
        return functools.cache(self.accelerator.print)

    def name_of(self, method: str) -> str:
        """Return a method's directory relative to the output directory, with `place` for an arm of an experiment."""
        return f"{method}/{self.place}" if self.place else method

    def folder_of(self, method: str) -> Path:
        """Return the directory of a method."""
        return self.options.folder_of(method, self.place)
