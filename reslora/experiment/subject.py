"""What an experiment asks of what it trains: images and texts answer it each in their way."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..common.signals import StopRequest
from ..files import read_object, write_json
from ..words import counted
from .arms import Arm
from .course import Course
from .parts import too_few
from .record import Facts, Parts, TestLosses
from .report import About

COMPARING = "stopped while comparing; the same command goes on"
TESTED = "test.json"  # in an arm's folder: the test losses of the chosen checkpoint


class Subject(ABC):
    """How arms are trained and measured."""

    course: Course
    prog: str
    """The script's name."""
    about: About
    """For the report."""
    parts: Parts
    stop: StopRequest
    device: torch.device
    """On which arms are trained."""

    @property
    @abstractmethod
    def marks(self) -> list[str]:
        """What each image or example of the test part is known by."""

    @abstractmethod
    def facts(self) -> Facts:
        """What `experiment.json` says of the whole."""

    @abstractmethod
    def train(self, arm: Arm) -> None:
        """Train an arm from where it stands to its exports, in every process; raises `Diverged` where it is lost."""

    def too_few(self) -> list[str]:
        """Return a line where too few images or examples compare."""
        return too_few(len(self.parts.test), self.about.unit, self.parts.enough)

    def say(self, phase: str, name: str = "") -> None:  # noqa: B027 - not every run has a status
        """Report in the run's status what is done now, with the arm that `name` is of."""

    def goes_on(self, ended: int, total: int) -> None:
        """Report in the status how many arms have ended, where they are trained at once."""
        self.say(f"training, {ended} of {counted(total, 'arm')} ended")

    def begins(self, phase: str, arm: Arm) -> None:
        """Report what is done with an arm next; raises `Stopped` where a stop was asked for.

        Like what follows, of the main process alone.
        """
        self.stop.check(COMPARING)
        self.say(phase, self.course.name_of(arm))

    @abstractmethod
    def measured(self, arm: Arm, step: int) -> dict:
        """The losses on the test part of an arm's checkpoint, and what else is measured of it."""

    @abstractmethod
    def base_losses(self) -> dict:
        """Return the base model's losses on the test part."""

    @abstractmethod
    def export(self, arm: Arm, step: int) -> list[str]:
        """Write the files of an arm's checkpoint into the experiment's folder; their names."""

    def is_tested(self, arm: Arm, step: int) -> bool:
        """Return whether the test losses of an arm's checkpoint are on disk."""
        there = read_object(self.course.folder_of(arm) / TESTED)
        return there.get("step") == step and there.get("images") == self.marks

    def base(self) -> TestLosses:
        """Return these losses with what they are of."""
        return {"images": self.marks} | self.base_losses()  # type: ignore[return-value]

    def tested(self, arm: Arm, step: int) -> TestLosses:
        """These losses, measured once, and then read from `test.json`."""
        path = self.course.folder_of(arm) / TESTED
        if not self.is_tested(arm, step):
            measured = self.measured(arm, step)
            write_json(path, {"step": step, "images": self.marks} | measured)
        there = read_object(path)
        del there["step"]
        return there  # type: ignore[return-value] # as it was written
