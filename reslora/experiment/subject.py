"""What an experiment asks of what it trains: images and texts answer it each in their way."""

from __future__ import annotations

from typing import Protocol

import torch

from .arms import Arm
from .record import Facts, TestLosses
from .report import About

COMPARING = "stopped while comparing; the same command goes on"


class Subject(Protocol):
    """How arms are trained and measured."""

    @property
    def about(self) -> About:
        """For the report."""

    @property
    def device(self) -> torch.device:
        """On which arms are trained."""

    def facts(self) -> Facts:
        """What `experiment.json` says of the whole."""

    def too_few(self) -> list[str]:
        """A line where too few images or examples compare."""

    def train(self, arm: Arm) -> None:
        """Trains an arm from where it stands to its exports, in every process; raises `Diverged` where it is lost."""

    def is_tested(self, arm: Arm, step: int) -> bool:
        """Whether the test losses of an arm's checkpoint are on disk. Like what follows, of the main process alone."""

    def begins(self, phase: str, arm: Arm) -> None:
        """Says what is done with an arm next; raises `Stopped` where a stop was asked for."""

    def tested(self, arm: Arm, step: int) -> TestLosses:
        """The losses on the test part of an arm's checkpoint, measured once."""

    def export(self, arm: Arm, step: int) -> list[str]:
        """Writes the files of an arm's checkpoint into the experiment's folder; their names."""
