"""State of an experiment: its arms, their results, and the next arm to train, all read from disk.

Only the main process uses this state (`processes.broadcast_from_main`).
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, refused_as
from ..formatting import pluralize
from ..io import read_object, write_json
from ..methods.registry import METHODS
from ..options.averages import Average
from ..options.grid import Grid
from ..runtime.checkpoint_folders import ADAPTERS, numbered, step_of
from ..runtime.log import of_split, read_log
from . import racing, record
from .arms import (
    MOST_EXTENSIONS,
    Arm,
    Label,
    Losses,
    arms_by_rate,
    averages_of_labels,
    choosing_of,
    coarse_to_fine,
    continued,
    grown,
    in_order,
    labels_of,
    options_of,
    place_of,
    rates_of,
    reference_of,
    references_of,
    shortcut_in_words,
)
from .choice import choose
from .verdicts import ALL

ENDED = "arm.json"  # how an arm has ended; written last


def reading_adapter(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Convert errors of reading an arm's adapter into an `InvalidArgument` with the fix."""
    return refused_as(str(folder), f"remove {folder}, then the run is trained again", (ValueError,))


def racing_there(folder: Path) -> bool | None:
    """Return whether the experiment in a directory uses racing (`racing.py`); None without an experiment."""
    identity = read_object(folder / record.EXPERIMENT).get("identity")
    return bool(identity.get("racing")) if isinstance(identity, dict) else None


@dataclass
class ArmSchedule:
    """The arms of an experiment and their results."""

    grid: Grid
    """Options of the experiment."""
    began: float = field(default_factory=time.monotonic)
    has_trained: bool = False
    """Whether an arm has ended since the start."""
    running: set[Arm] = field(default_factory=set)
    measuring: float = 0.0
    """Seconds that measurements of arms took in this process."""
    estimated: bool = False
    """Whether `print_estimate` has printed the expected time, or another process does so."""

    def __post_init__(self) -> None:
        trained = labels_of(self.grid)
        self.labels = {label.name: label for label in [*trained, *averages_of_labels(self.grid, trained)]}
        self.seeds: list[int] = self.grid.values("seed")
        self.given: list[float] = sorted(self.grid.rates)
        self.grids = {label.name: continued(rates_of(self.grid, label), self.rates_there(label)) for label in trained}
        self.choosing = choosing_of(self.seeds, len(self.given))
        self.begun_with: bool | None = racing_there(self.folder)
        self.racing: bool = self.races() if self.begun_with is None else self.begun_with
        self.chosen_rates: dict[tuple, float | None] = {}
        self.lowest: dict[Arm, float] = {}
        self.reference = reference_of(self.grid, list(self.labels.values()))
        named = self.grid.base.experiment.reference
        self.against: str = self.grid.base.experiment.against or ("reference" if named else ALL)

    @property
    def folder(self) -> Path:
        """Directory of the experiment."""
        return Path(self.grid.base["output_dir"])

    def races(self) -> bool:
        """Return whether a new experiment with these options stops clearly worse learning rates early (`racing.py`)."""
        experiment = self.grid.base.experiment
        fits = (experiment.arms_at_once or 1) <= len(self.grids)
        return fits if experiment.racing is None else experiment.racing

    @property
    def is_race_off(self) -> bool:
        """Whether --arms_at_once has turned off the race of a new experiment with several learning rates."""
        new = self.begun_with is None and self.grid.base.experiment.racing is None
        return new and not self.racing and len(self.given) > 1

    def check_racing(self) -> None:
        """Raise `InvalidArgument` if --racing contradicts the experiment in the directory."""
        asked, there = self.grid.base.experiment.racing, self.begun_with
        if None not in (asked, there) and asked != there:
            problem = f"{self.folder} was begun {'with' if there else 'without'} racing"
            raise InvalidArgument("--racing", problem, "leave it out, or choose another --output_dir")

    def rates_there(self, label: Label) -> list[float]:
        """Return the learning rates that earlier starts have added, from the names of directories."""
        if not self.grid.base.experiment.extend_rates:
            return []
        found = []
        for path in (self.folder / label.method / label.place).glob("lr-*"):
            with contextlib.suppress(ValueError):  # not a directory of this program
                found.append(float(path.name.removeprefix("lr-")))
        return found

    def place_of(self, arm: Arm) -> str:
        """Return the directory of an arm, relative to the directory of its method."""
        return place_of(self.labels[arm.label], arm)

    def folder_of(self, arm: Arm) -> Path:
        """Return the directory of an arm."""
        return self.folder / self.labels[arm.label].method / self.place_of(arm)

    def name_of(self, arm: Arm) -> str:
        """Return an arm's directory, relative to the experiment's directory, such as `lora/lr-0.0001/seed-0`."""
        return self.folder_of(arm).relative_to(self.folder).as_posix()

    def options_of(self, arm: Arm) -> Any:
        """Return an arm's options, as those of a single run."""
        return options_of(self.grid, self.labels[arm.label], arm.rate, arm.seed)

    def arms(self) -> list[Arm]:
        """Return all arms: first those that are trained, then the averages of their checkpoints."""
        return self.trained_arms() + self.averages()

    def trained_arms(self) -> list[Arm]:
        """Return the arms that are trained: first those whose seeds choose learning rates, then those of other seeds.

        The former are in order of label, learning rate and seed, and the latter in order of seed and method. Arms
        that a race has ruled out are not included.
        """
        return [arm for label in self.grids for arm in self.choosing_arms(label)] + self.other_arms()

    def averages(self) -> list[Arm]:
        """Return the arms of --average_checkpoints, in order of seed and label.

        The learning rate of an average is the one that was chosen for the averaged method, because only there are all
        seeds trained. A method without a chosen learning rate has no averages.
        """
        labels = [label for label in self.labels.values() if label.average]
        rates = {label.source: self.rate_of(label.source) for label in labels}
        return [
            Arm(label.name, rate, seed)
            for seed in self.seeds
            for label in labels
            if (rate := rates[label.source]) is not None
        ]

    def average_of(self, arm: Arm) -> tuple[Average, Path] | None:
        """Return an arm's average and the directory of the averaged run; None for an arm that is trained."""
        average, source = self.labels[arm.label].average, self.source_of(arm)
        return (average, self.folder_of(source)) if average and source else None

    def source_of(self, arm: Arm) -> Arm | None:
        """Return the arm whose checkpoints an arm averages; None for an arm that is trained."""
        source = self.labels[arm.label].source
        return Arm(source, arm.rate, arm.seed) if source else None

    def choosing_arms(self, label: str) -> list[Arm]:
        """Return the arms by which a method's learning rate is chosen, in order of learning rate and seed.

        In a race these are only the arms that have ended, and those that may still be trained.
        """
        arms = [Arm(label, rate, seed) for rate in self.grids[label] for seed in self.choosing]
        if not self.is_race:
            return arms
        losses = self.race(label)
        near = racing.near_best(losses) if losses else [self.start_of(label)]
        open_to = {self.seeds[0]: self.rates_to_race(label, losses)}
        return [arm for arm in arms if arm.rate in open_to.get(arm.seed, near) or self.ended(arm)]

    @property
    def is_race(self) -> bool:
        """Whether the learning rates of each method race, with the first seed."""
        return self.racing and len(self.given) > 1

    def start_of(self, label: str) -> float:
        """Return the learning rate that a method trains first."""
        return coarse_to_fine(rates_of(self.grid, self.labels[label]))[0]

    @property
    def total_in_words(self) -> str:
        """The number of all arms; `at most` if the race may still leave some out."""
        may_shrink = self.is_race and any(len(self.rates_to_race(name, self.race(name))) > 1 for name in self.grids)
        return f"{'at most ' * may_shrink}{len(self.arms())}"

    def runs_in_words(self) -> str:
        """Return how many arms there are, how many of them choose learning rates, and how many are not trained."""
        choosing, averages = sum(len(self.choosing_arms(label)) for label in self.grids), len(self.averages())
        arms = f"{self.total_in_words} {'run' if len(self.arms()) == 1 else 'runs'}"
        arms += f", {choosing} to choose learning rates" if len(self.given) > 1 else ""
        return arms + (f", {pluralize(averages, 'average')} without training" if averages else "")

    def race(self, label: str) -> dict[float, float]:
        """Return the lowest loss at each learning rate at which the method's first seed has ended.

        The loss is infinite if the arm diverged or was stopped early.
        """
        arms = [Arm(label, rate, self.seeds[0]) for rate in self.grids[label]]
        return {arm.rate: self.loss_of(arm) for arm in arms if self.ended(arm)}

    def rates_to_race(self, label: str, losses: Mapping[float, float]) -> list[float]:
        """Return the learning rates that the method's race may still train, the next one first."""
        return racing.remaining(self.grids[label], losses, self.start_of(label))

    @property
    def others(self) -> list[int]:
        """The seeds that do not choose learning rates."""
        return [seed for seed in self.seeds if seed not in self.choosing]

    def other_arms(self) -> list[Arm]:
        """Return the arms of the seeds in `others`.

        Each of these seeds is trained at the method's chosen learning rate only. Arms at other learning rates are
        included if their training has ended, for example because an earlier choice was different.
        """
        rates = {label: self.rate_of(label) for label in self.grids}
        return [
            arm
            for seed in self.others
            for label in self.grids
            for arm in (Arm(label, rate, seed) for rate in self.grids[label])
            if arm.rate == rates[label] or self.ended(arm)
        ]

    def rate_of(self, label: str) -> float | None:
        """Return a method's chosen learning rate.

        None if at least one seed failed at each of the learning rates. The result is the middle learning rate until all
        arms that choose learning rates have ended.
        """
        rates = self.grids[label]
        failed = [rate for rate in rates for seed in self.others if self.ended(Arm(label, rate, seed)).get("reason")]
        known = label, *rates, "failed", *failed
        if known not in self.chosen_rates:
            arms = self.choosing_arms(label)
            if not all(map(self.ended, arms)):
                return coarse_to_fine(rates)[0]
            arms += [Arm(label, rate, seed) for rate in failed for seed in self.others]
            found = choose(map(self.record, arms), self.choosing).get(label)
            self.chosen_rates[known] = found["learning_rate"] if found else None
        return self.chosen_rates[known]

    @property
    def references(self) -> list[str]:
        """The methods with which others are compared."""
        return references_of(self.grid, list(self.labels.values()))

    # -- results of the arms -------------------------------------------------------------------------------------------

    def ended(self, arm: Arm) -> dict:
        """Return the status, reason, memory and time of an arm that has ended; empty for any other arm.

        An arm that racing has stopped early counts as ended only as long as learning rates race (`is_race`).
        """
        ended = read_object(self.folder_of(arm) / ENDED)
        return ended if self.is_race or ended.get("status") != "stopped" else {}

    def measured(self, seconds: float) -> None:
        """Add the time of a measurement."""
        self.measuring += seconds

    def end(
        self,
        arm: Arm,
        reason: str,
        memory: int | None,
        seconds: float,
        to_conclude: float = 0.0,
        stopped: bool = False,
        measuring: float = 0.0,
    ) -> None:
        """Record that an arm has ended after `seconds` in this process.

        `reason`: why the arm failed or, if `stopped`, was stopped early; empty if the arm has finished. `memory`: its
        peak memory in bytes. `to_conclude`: expected seconds to test and export the arm. `measuring`: seconds of the
        arm's measurements.
        """
        status = "stopped" if stopped else "failed" if reason else "finished"
        known = {"status": status, "reason": reason, "memory_bytes": memory}
        times = {"wall_seconds": round(seconds, 3), "conclusion_seconds": round(to_conclude, 3)}
        times["measuring_seconds"] = round(measuring, 3)
        write_json(self.folder_of(arm) / ENDED, known | times)

    def select_losses(self, arm: Arm) -> dict[int, float]:
        """Return the loss on the selection split at every step that may be chosen."""
        return {row["step"]: row["loss"] for row in self.validations(arm)}

    def validations(self, arm: Arm) -> list[dict]:
        """Return the rows of an arm's log with losses on the selection split, without that of step 0."""
        return [row for row in of_split(read_log(self.folder_of(arm) / "log.jsonl"), "validation") if row["step"]]

    def base_select(self) -> float | None:
        """Return the loss on the selection split before training, as logged by any arm before its first step."""
        for arm in self.arms():
            for row in of_split(read_log(self.folder_of(arm) / "log.jsonl"), "validation"):
                if row["step"] == 0 and math.isfinite(row["loss"]):
                    return row["loss"]
        return None

    def losses(self) -> dict[Arm, float]:
        """Return the lowest loss on the selection split of each arm that has ended.

        It is infinite if the arm diverged or was stopped early. Raises `InvalidArgument` for a finished arm whose
        losses are missing.
        """
        return {arm: self.loss_of(arm) for arm in self.arms() if self.ended(arm)}

    def loss_of(self, arm: Arm) -> float:
        """Return an ended arm's entry in `losses`."""
        if self.ended(arm).get("status") != "finished":
            return math.inf
        if arm not in self.lowest:
            self.lowest[arm] = self.lowest_loss(arm)
        return self.lowest[arm]

    def lowest_loss(self, arm: Arm) -> float:
        """Return the lowest loss on the selection split of a finished arm.

        Raises `InvalidArgument` if losses are missing.
        """
        losses, folder = self.select_losses(arm), self.folder_of(arm)
        lost = [step_of(path) for path in numbered(folder / ADAPTERS, "step") if step_of(path) not in losses]
        if lost or not losses:  # otherwise the remaining losses would decide
            problem = "log.jsonl has no validation loss" + (f" of step {lost[0]}" if lost else "")
            raise InvalidArgument(str(folder), problem, f"remove {folder}, then the run is trained again")
        return min(losses.values())

    def next_arm(self) -> Arm | None:
        """Return the next arm to train; None if all have ended or are running, or if the time is over.

        With --extend_rates, learning rates are added to the grids first, where they are needed (`grown`).
        """
        losses = self.losses()
        first = [arm for arm in self.trained_arms() if arm.seed == self.seeds[0]]
        if self.grid.base.experiment.extend_rates and all(arm in losses for arm in first):
            left_out = {Arm(label, rate, self.seeds[0]): math.inf for label in self.grids for rate in self.grids[label]}
            grids = grown(self.grids, self.choosing, left_out | losses)
            if max(map(len, grids.values())) <= len(self.given) + MOST_EXTENSIONS:
                self.grids = grids
        begun = losses.keys() | self.running
        order = self.race_order(losses) if self.is_race else in_order(self.grids, self.choosing, losses)
        if all(arm in losses for arm in order):
            order = sorted([*self.other_arms(), *self.averages()], key=lambda arm: self.seeds.index(arm.seed))
        todo = [arm for arm in order if arm not in begun and self.source_of(arm) in (None, *losses)]
        return todo[0] if todo and self.has_time() else None

    def race_order(self, losses: Losses) -> list[Arm]:
        """Return the arms that choose learning rates and may be trained now, in order; some may be running already.

        Until all races are decided, this is the next arm of each method's race, first those of methods that have
        trained fewer arms; the result of an arm decides which one is next. Afterwards, these are the arms of the other
        choosing seeds at each method's best learning rates (`racing.near_best`).
        """
        first = self.seeds[0]
        races = {label: self.rates_to_race(label, self.race(label)) for label in self.grids}
        if any(races.values()):
            trained = Counter(arm.label for arm in losses if arm.seed == first)
            labels = sorted((label for label, rates in races.items() if rates), key=trained.__getitem__)
            return [Arm(label, races[label][0], first) for label in labels]
        near = {label: racing.near_best(self.race(label)) for label in self.grids}
        return [arm for seed in self.choosing[1:] for arm in arms_by_rate(near, seed)]

    def why_stop(self, arm: Arm) -> str:
        """Return why racing stops an arm early, from the losses in its log; empty if it continues or does not race.

        The arm is compared with the finished arm of its method and seed that has the lowest loss.
        """
        if not self.is_race or arm.seed != self.seeds[0] or self.source_of(arm):
            return ""
        losses = {rate: loss for rate, loss in self.race(arm.label).items() if math.isfinite(loss)}
        if not losses or self.ended(arm):
            return ""
        rate = min(losses, key=losses.__getitem__)
        curve, best = self.select_losses(arm), self.select_losses(Arm(arm.label, rate, arm.seed))
        step = racing.stopped_at(curve, best, higher=arm.rate > rate)
        if step is None:
            return ""
        worse = f"{100 * (curve[step] / best[step] - 1):.2g}% above that of learning rate {rate:g}"
        return f"stopped early at step {step}: selection loss {curve[step]:.4f}, {worse}"

    def has_time(self) -> bool:
        """Return whether another arm may start: the first one always, others until --experiment_minutes are over."""
        limit = self.grid.base.experiment.experiment_minutes
        return not (limit and self.has_trained) or time.monotonic() - self.began < 60 * limit

    def seconds_to_conclude(self, arms: int) -> float:
        """Return the expected time, in seconds, of tests and exports once this many arms have ended."""
        known = [self.ended(arm).get("conclusion_seconds", 0.0) for arm in self.arms()]
        compared = min(arms, len(self.labels) * len(self.seeds))
        at_once = min(compared, self.grid.base.experiment.arms_at_once or 1) or 1
        return compared * max(known, default=0.0) / at_once

    def minutes_left(self) -> float | None:
        """Return the expected minutes of the remaining arms, tests and exports; None before the first arm has ended."""
        arms, left = self.arms(), 0.0
        trained = [ended for arm in self.trained_arms() if (ended := self.ended(arm))]
        if not trained:
            return None
        # An average is evaluated as often as the arm whose checkpoints it averages.
        for name, kind in (("wall_seconds", self.trained_arms()), ("measuring_seconds", self.averages())):
            to_come = sum(not self.ended(arm) for arm in kind)
            left += to_come * sum(ended.get(name, 0.0) for ended in trained) / len(trained)
        return (left + self.seconds_to_conclude(len(arms))) / 60

    # -- for experiment.json -------------------------------------------------------------------------------------------

    def record(self, arm: Arm, test: record.TestLosses | None = None) -> record.Arm:
        """Return what `experiment.json` stores about an arm."""
        adapter, ended, folder = self.options_of(arm).adapter, self.ended(arm), self.folder_of(arm)
        label, rows = self.labels[arm.label], read_log(folder / "log.jsonl")
        method: str = label.method
        shortcut = shortcut_in_words(adapter.shortcut, adapter.pre_num) if METHODS[method].reads_shortcut else None
        last: dict = rows[-1] if rows else {"step": 0, "seconds": 0.0}
        found: record.Arm = {
            "label": arm.label,
            "method": method,
            "learning_rate": arm.rate,
            "seed": arm.seed,
            "rank": adapter.rank,
            "values": {self.grid.base.option(name).name: value for name, value in label.values.items()},
            "shortcut": shortcut,
            "folder": self.name_of(arm),
            "status": ended.get("status") or ("running" if arm in self.running else "waiting"),
            "reason": ended.get("reason", ""),
            "steps": last["step"],
            "seconds": 0.0 if label.average else last["seconds"],
            "wall_seconds": ended.get("wall_seconds"),
            "measuring_seconds": ended.get("measuring_seconds"),
            "memory_bytes": ended.get("memory_bytes"),
            "file_bytes": sum(path.stat().st_size for path in (folder / "peft").rglob("*.safetensors")) or None,
            "seconds_by_step": {str(row["step"]): row["seconds"] for row in self.validations(arm)},
            "select_by_step": {
                str(step): loss if math.isfinite(loss) else None for step, loss in self.select_losses(arm).items()
            },
            "test": test,
        }
        if label.average:
            found["average_of"] = label.source
        return found
