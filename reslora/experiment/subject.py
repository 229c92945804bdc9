"""What an experiment asks of what it trains: images and texts answer it each in their way."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..common.folder import check_held
from ..files import read_object, write_json
from .arms import Arm
from .course import Course
from .record import Facts, TestLosses
from .report import About

COMPARING = "stopped while comparing; the same command goes on"
TESTED = "test.json"  # in an arm's folder: the test losses of the chosen checkpoint


class Subject(ABC):
    """How arms are trained and measured."""

    course: Course
    about: About
    """For the report."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """On which arms are trained."""

    @property
    @abstractmethod
    def marks(self) -> list[str]:
        """What each image or example of the test part is known by."""

    @abstractmethod
    def facts(self) -> Facts:
        """What `experiment.json` says of the whole."""

    @abstractmethod
    def too_few(self) -> list[str]:
        """A line where too few images or examples compare."""

    @abstractmethod
    def train(self, arm: Arm) -> None:
        """Trains an arm from where it stands to its exports, in every process; raises `Diverged` where it is lost."""

    @abstractmethod
    def goes_on(self, ended: int, total: int) -> None:
        """Says how many arms have ended, where they are trained at once."""

    @abstractmethod
    def begins(self, phase: str, arm: Arm) -> None:
        """Says what is done with an arm next; raises `Stopped` where a stop was asked for. Like what follows, of the
        main process alone."""

    @abstractmethod
    def measured(self, arm: Arm, step: int) -> dict:
        """The losses on the test part of an arm's checkpoint, and what else is measured of it."""

    @abstractmethod
    def base_losses(self) -> dict:
        """Return the base model's losses on the test part."""

    @abstractmethod
    def export(self, arm: Arm, step: int) -> list[str]:
        """Writes the files of an arm's checkpoint into the experiment's folder; their names."""

    def is_tested(self, arm: Arm, step: int) -> bool:
        """Whether the test losses of an arm's checkpoint are on disk."""
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
            check_held()
            write_json(path, {"step": step, "images": self.marks} | measured)
        there = read_object(path)
        del there["step"]
        return there  # type: ignore[return-value] # as it was written
