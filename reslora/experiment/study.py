"""The interface by which an experiment trains and evaluates its arms, implemented for images and for texts."""

import contextlib
import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import Diverged, StoppedEarly
from ..formatting import pluralize
from ..io import read_object, write_json
from ..options.averages import Average
from ..runtime.checkpoint_folders import EXPORTED, EXPORTS
from ..runtime.peak_memory import peak_memory
from ..runtime.processes import broadcast_from_main
from ..training.averaged_run import average_run
from ..training.checkpoints import plan_resume
from ..training.context import Context
from ..training.loop import take_step, train_method
from ..training.schedule import Schedule
from ..training.state import Learner
from ..training.study import Study
from .arms import Arm
from .hashed_split import few_to_choose, too_few
from .record import Facts, Parts, TestLosses
from .report import About, duration
from .schedule import ArmSchedule

COMPARING = "stopped while comparing; run the same command to resume"
TESTED = "test.json"  # test losses of the chosen checkpoint, in an arm's directory

TIMED_STEPS = 5  # steps of the first arm from which the time of the experiment is estimated
LEAST_LOSS = 1e-12  # the statistics need losses above zero


def numbers(losses: Iterable[float]) -> list[float | None]:
    """Return test losses for JSON: None for a loss that is not finite, and LEAST_LOSS for a smaller one.

    A confident prediction can have a loss that rounds to zero, and the mask of a cropped image can be zero everywhere.
    """
    return [max(loss, LEAST_LOSS) if math.isfinite(loss) else None for loss in losses]


def timing(batches: Generator, passes: Iterable[int], timed: Callable[[float], None] | None) -> Generator:
    """Yield the batches, and pass the median time of the steps after the first one, which may compile, to `timed`.

    `passes`: number of batches of each of the first 1 + TIMED_STEPS steps; `timed`: None in processes that do not print
    it.
    """
    starts = {*itertools.accumulate(passes, initial=0)}
    times: list[float] = []
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            if number in starts:
                times.append(time.monotonic())
                if len(times) == 2 + TIMED_STEPS and timed is not None:
                    # a median, because a checkpoint or a measurement may follow a step
                    timed(statistics.median(end - begin for begin, end in itertools.pairwise(times[1:])))
            yield batch


def time_steps(learner: Learner, study: Study) -> float:
    """Train the first steps, and return the median time in seconds of those after the first one, which may compile."""
    times = []
    with contextlib.closing(study.batches(range(2 + TIMED_STEPS))) as batches:
        for _ in range(1 + TIMED_STEPS):
            began = time.monotonic()
            take_step(learner, batches, study).item()
            times.append(time.monotonic() - began)
    return statistics.median(times[1:])


@dataclass(frozen=True)
class ArmStudy(Study):
    """The study of an arm: training writes no exports; the experiment exports arms when it compares them.

    A subclass also inherits from the study of a single run of images or texts, whose methods are called by `super`.
    """

    race: Callable[[], None] = lambda: None
    """Function that raises `StoppedEarly` in every process if another learning rate is better."""
    timed: Callable[[float], None] = lambda _: None
    """Function that receives the median time in seconds of a few of the first steps."""
    took: Callable[[float], None] = lambda _: None
    """Function that receives the time of a measurement and its samples, in seconds."""

    def batches(self, steps: range) -> Generator:
        """Yield batches as a single run does, and time the steps after the first one, which may compile."""
        timed = self.timed if self.context.accelerator.is_main_process else None
        passes = (self.passes(step + 1) for step in steps[: 1 + TIMED_STEPS])
        return timing(super().batches(steps), passes, timed)  # type: ignore[safe-super]

    def validate(self, learner: Learner, reports: Any, parts: Sequence[str] | None = None) -> None:
        """Measure and sample as a single run does, and end the arm if another learning rate is better."""
        started = time.monotonic()
        super().validate(learner, reports, parts)  # type: ignore[safe-super]
        self.took(time.monotonic() - started)
        self.race()

    def export(self, learner: Learner, schedule: Schedule) -> dict[str, float]:
        """Write nothing, and return no differences."""
        return {}


def train_arm(study: ArmStudy, average: tuple[Average, Path] | None) -> None:
    """Train an arm from its latest checkpoint, if it has one, in every process.

    `average`: the average that the arm computes from the checkpoints of another arm, and the directory of that arm;
    None to train. Raises `Diverged` if a loss is not finite, and `StoppedEarly`.
    """
    context, (method,) = study.context, study.context.options.adapter.method
    resume = broadcast_from_main(lambda: plan_resume(context.options, study.identity, context.place))
    if context.options.training.compile:
        torch.compiler.reset()  # the compiler falls back to eager mode after a number of recompilations
    try:
        if average:
            average_run(method, *average, study)
        elif method not in resume.finished:
            train_method(method, resume, study)
    finally:
        context.accelerator.free_memory()


def race(arm: Arm, schedule: ArmSchedule) -> None:
    """Raise `StoppedEarly` in every process if an arm's measurements show that another learning rate is better."""
    if reason := broadcast_from_main(lambda: schedule.why_stop(arm)):
        raise StoppedEarly(reason)


def print_estimate(
    schedule: ArmSchedule,
    device: torch.device,
    steps: int,
    step: float,
    start: float,
    measuring: float,
    test: float,
) -> None:
    """Print an estimate of the experiment's remaining time; only the first call for a schedule prints it.

    `steps`: number of steps of an arm. The arguments after it are in seconds. `step`: time of one step. For one arm,
    `start`: time before its first step; `measuring`: time of all its measurements on the selection split; `test`: time
    of its test and export.
    """
    if schedule.estimated:
        return
    schedule.estimated = True
    left = sum(not schedule.ended(arm) for arm in schedule.arms())
    trained = sum(not schedule.ended(arm) for arm in schedule.trained_arms())
    compared = min(len(schedule.arms()), len(schedule.labels) * len(schedule.seeds))
    at_once = min(left, schedule.grid.base.experiment.arms_at_once or 1)
    times = [
        count * seconds / at_once
        for count, seconds in ((left, start), (trained, steps * step), (left, measuring), (compared, test))
    ]
    training, measured, tested = map(duration, (times[0] + times[1], *times[2:]))
    parts = f"{training} of training, {measured} of measurements, {tested} of tests and exports"
    memory = peak_memory(device)
    used = f"; so far {memory / 2**30:.2f} GiB" if memory else ""
    most = "at most " * schedule.is_race
    print(f"estimate: {most}{duration(sum(times))} for {pluralize(left, 'run')} ({parts}){used}", flush=True)


class ExperimentStudy(ABC):
    """Interface for training and evaluating the arms of an experiment."""

    schedule: ArmSchedule
    prog: str
    """Name of the script."""
    about: About
    """Texts of the report."""
    parts: Parts
    context: Context
    """The context of the experiment, from which those of arms are made."""

    @property
    def device(self) -> torch.device:
        """Device for training."""
        return self.context.accelerator.device

    @property
    @abstractmethod
    def test_ids(self) -> list[str]:
        """Identifier of each image or example in the test split."""

    @property
    def test_order(self) -> list[int]:
        """Places of the test items in the order in which they were made; empty if it is unknown."""
        return []

    @property
    def test_items(self) -> dict[str, Any]:
        """The test items of `TestLosses`, with their groups or their order."""
        groups, order = self.parts.groups, self.test_order
        more = {"groups": list(groups)} if groups else {"order": order} if order else {}
        return {"images": self.test_ids} | more

    @abstractmethod
    def facts(self) -> Facts:
        """Return the properties that `experiment.json` stores about the experiment as a whole."""

    @abstractmethod
    def train(self, arm: Arm) -> None:
        """Train an arm from its present state to its last step, in every process.

        It calls `race` after each measurement. Raises `Diverged` if a loss is not finite, and `StoppedEarly`.
        """

    def too_few(self) -> list[str]:
        """Return warnings if the selection or test split is too small."""
        groups, unit = len(set(self.parts.groups)), self.about.unit
        few = too_few(groups or len(self.parts.test), "group" if groups else unit, self.parts.enough)
        return [*few_to_choose(len(self.parts.select), unit), *few]

    def say(self, phase: str, name: str = "") -> None:
        """Write the current phase to the run's status; `name`: the arm that the message is about; empty if it is about
        no arm.
        """
        self.context.status.say(phase, name)

    def report_progress(self, ended: int, total: int) -> None:
        """Write to the status how many arms have ended, if several are trained at once."""
        self.say(f"training, {ended} of {pluralize(total, 'run')} ended")

    def start_phase(self, phase: str, arm: Arm) -> None:
        """Write the next phase of an arm to the run's status.

        Raises `Stopped` if a stop was requested. Only the main process calls this method and the methods below.
        """
        self.context.stop.check(COMPARING)
        self.say(phase, self.schedule.name_of(arm))

    @abstractmethod
    def test_and_export(self, arm: Arm, step: int, keep: Callable[[dict], None] | None, to_export: bool) -> None:
        """Merge an arm's checkpoint once, to test it and, if `to_export`, to write the arm's files.

        `keep` takes the losses and other metrics on the test split; None: do not test. Raises `Diverged`.
        """

    @abstractmethod
    def base_losses(self) -> dict:
        """Return the losses on the test split before training."""

    def seconds_to_conclude(self) -> float:
        """Return the expected time, in seconds, to test and export one arm; 0 if unknown."""
        return 0.0

    def is_exported(self, arm: Arm, step: int) -> bool:
        """Return whether an arm's exported files exist and are those of its checkpoint at this step."""
        folder = self.schedule.folder_of(arm)
        record = read_object(folder / EXPORTS)
        files = ("peft", *record.get("read_back", ()))
        return record.get(EXPORTED) == step and all((folder / name).exists() for name in files)

    @abstractmethod
    def export(self, arm: Arm, step: int) -> list[str]:
        """Export an arm's checkpoint into the experiment's directory, and return the names of the files."""

    def is_tested(self, arm: Arm, step: int) -> bool:
        """Return whether the test losses of an arm's checkpoint are on disk."""
        there = read_object(self.schedule.folder_of(arm) / TESTED)
        return there.get("step") == step and there.get("images") == self.test_ids

    def base(self) -> TestLosses:
        """Return the losses before training with the identifiers of the images or examples."""
        return self.test_items | self.base_losses()  # type: ignore[return-value]

    def evaluate(self, arm: Arm, step: int, test: bool, export: bool) -> str:
        """Test and export a compared arm, and return a note if its export has diverged; empty otherwise.

        The test losses are written to `test.json`.
        """
        path = self.schedule.folder_of(arm) / TESTED

        def write_tested(measured: dict) -> None:
            """Write the losses and other metrics on the test split to `test.json`."""
            write_json(path, {"step": step} | self.test_items | measured)

        try:
            self.test_and_export(arm, step, write_tested if test else None, export)
        except Diverged as error:
            if test and not self.is_tested(arm, step):
                raise
            return str(error)
        return ""

    def test_losses(self, arm: Arm) -> TestLosses:
        """Return the test losses of an arm that is tested."""
        there = read_object(self.schedule.folder_of(arm) / TESTED)
        del there["step"]
        return there  # type: ignore[return-value] # as it was written
