"""The arms of an experiment and their order of training, as functions of options and results.

An arm is one run of the experiment: a method with a learning rate and a seed. If options such as the rank vary, each
method is compared in several variants, such as `lora rank 4` and `lora rank 8`; "method" below means such a variant
(`Label`). Each average of --average_checkpoints also counts as a method. The arms of an average are not trained: they
average the adapters that arms of another method have saved.

The order of training does not depend on a time limit, so that an experiment without a limit can resume a limited one:

1. The first seed at all learning rates and methods. The learning rates go from coarse to fine, starting in the middle;
each is trained with every method before the next one. So whenever the experiment ends, the numbers of learning rates
that two methods have tried differ by at most one.

2. The other seeds that choose learning rates, one after the other, at NEAR learning rates of each method: first the one
that is best with the first seed, then the nearest ones. Afterwards the same seeds at all other learning rates.

3. The seeds that do not choose learning rates, one after the other, at each method's chosen learning rate. The averages
of a seed follow after its other arms.

If the learning rates race (`racing.py`), `ArmSchedule.race_order` takes the place of 1 and 2.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import require_package
from ..config import PLAIN, SHORTCUTS
from ..errors import InvalidArgument
from ..formatting import pluralize
from ..methods.registry import METHODS
from ..options.argument_parser import did_you_mean
from ..options.averages import Average, averages_of
from ..options.grid import Grid, O
from ..options.optimizers import named
from ..options.shared import SharedExperimentOptions
from ..options.unused import is_read
from ..options.values import as_typed
from ..seeds import derive
from .verdicts import REFERENCE

NEAR = 3  # number of learning rates around the best one at which further seeds are trained first
# shortcuts for which --pre_num counts blocks
SEVERAL_BLOCKS = tuple(name for name in SHORTCUTS if name not in (PLAIN, "input"))
MOST_EXTENSIONS = 3  # maximum number of extensions of the learning rates by --extend_rates
LEAST_RATIO = 1.02  # minimum ratio of two learning rates to extend them
PLACED = ("learning_rate", "seed", "shortcut", "pre_num", "rank")  # not written as `name=value` in labels
LONGEST_VALUE = 40  # characters of a list in names of directories
EVERY = 4  # one of this many seeds chooses learning rates, starting with the first


@dataclass(frozen=True)
class Label:
    """What an experiment compares: a method or, if options vary, a variant of it, such as `lora rank 4`.

    A label does not name a learning rate or a seed: its arms have several of them.
    """

    name: str
    method: str
    rank: int | None
    """The rank of this label; None if all methods have the same rank. `shortcut` and `pre_num` likewise."""
    shortcut: str | None
    place: str = ""
    """Prefix of the learning rate in directory names."""
    pre_num: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values of the other options that vary, by the name common to all scripts."""
    average: Average | None = None
    """The average of checkpoints that is compared; None if single checkpoints are."""
    source: str = ""
    """Name of the label whose checkpoints are averaged; empty without `average`."""


@dataclass(frozen=True)
class Arm:
    """One training run of an experiment, or an average of its checkpoints."""

    label: str
    rate: float
    seed: int


Grids = Mapping[str, Sequence[float]]
"""Learning rates of each label, in ascending order."""
Losses = Mapping[Arm, float]
"""Lowest loss on the selection split of every arm that has ended; infinite if the arm diverged."""


# -- from options to arms ----------------------------------------------------------------------------------------------


def labels_of(grid: Grid) -> list[Label]:
    """Return the variants of each method that are compared, such as one of ResLoRA for each shortcut.

    An option that varies makes no further variants of a method that does not use it.
    """
    found, shared, varied = [], grid.base.adapter, grid.varied
    for method in grid.methods:
        row = METHODS[method]
        for shortcut in varied.get("shortcut", [None]) if row.reads_shortcut else [None]:
            kind = shortcut or shared.shortcut
            for pre_num in varied.get("pre_num", [None]) if row.reads_shortcut and kind in SEVERAL_BLOCKS else [None]:
                named, blocks = (shortcut, shared.pre_num) if pre_num is None else (kind, pre_num)
                told = shortcut_in_words(named, blocks)
                folder = (f"{shortcut}/" if shortcut else "") + (f"pre_num-{pre_num}/" if pre_num is not None else "")
                for rank in varied.get("rank", [None]):
                    name = " ".join(filter(None, [method, told, f"rank {rank}" if rank else ""]))
                    place = folder + (f"rank-{rank}/" if rank else "")
                    for values in others_of(grid, method):
                        own = {grid.base.option(option).name: in_folder(value) for option, value in values.items()}
                        whole = " ".join([name, *(f"{option}={value}" for option, value in own.items())])
                        there = place + "".join(f"{option}-{value}/" for option, value in own.items())
                        found.append(Label(whole, method, rank, shortcut, there, pre_num, values))
    return found


def averages_of_labels(grid: Grid, labels: Sequence[Label]) -> list[Label]:
    """Return the labels of the averages of --average_checkpoints, such as `lora ema:0.99`, for each of `labels`."""
    given, found = grid.base["average_checkpoints"], []
    for label, average in itertools.product(labels, averages_of(given) if given else ()):
        name, place = f"{label.name} {average}", f"{label.place}average_checkpoints-{str(average).replace(':', '-')}/"
        found.append(dataclasses.replace(label, name=name, place=place, average=average, source=label.name))
    return found


def check_evaluations(grid: Grid, steps: int, every: int, flag: str) -> None:
    """Raise `InvalidArgument` if runs are evaluated less often than an average of --average_checkpoints needs.

    `steps`: number of training steps. `every`: steps between evaluations. `flag`: the option that sets `every`.
    """
    if not (given := grid.base["average_checkpoints"]):
        return
    count, least = math.ceil(steps / every), max(average.least for average in averages_of(given))
    if count < least:
        problem = f"averages {least} or more evaluated checkpoints, and a run of {steps} steps is evaluated"
        fix = f"give {flag} {steps // least}" if steps >= least else "train for more steps"
        raise InvalidArgument(f"--average_checkpoints {given}", f"{problem} {pluralize(count, 'time')}", fix)


def others_of(grid: Grid, method: str) -> list[dict[str, Any]]:
    """Return `Label.values` for each variant of a method, from the values of the options that the method uses."""
    names = [name for name in grid.varied if name not in PLACED and is_read(grid.base.option(name), [method])]
    return [dict(zip(names, own, strict=True)) for own in itertools.product(*(grid.varied[name] for name in names))]


def in_folder(value: object) -> str:
    """Return an option's value as text for names of methods and directories.

    A list that is long or contains characters that a file system may not accept is shortened, with a hash.
    """
    if isinstance(value, list):
        text = "+".join(map(str, value))
        plain = re.sub(r"[^\w.+-]", "_", text)[:LONGEST_VALUE]
        return text if plain == text else f"{plain}-{derive('value', text) % 16**6:06x}"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def rates_of(grid: Grid, label: Label) -> list[float]:
    """Return a method's learning rates in ascending order.

    If the optimizer varies, a method whose optimizer has a learning rate of its own, as Prodigy has, gets only this
    learning rate.
    """
    own = named(label.values["optimizer"]).learning_rate if "optimizer" in label.values else None
    return sorted(grid.rates) if own is None else [own]


def reference_of(grid: Grid, labels: Sequence[Label]) -> str:
    """Return the method or variant with which the others are compared: --reference, or else LoRA.

    Without --reference, and if the only method is not LoRA and has several variants, it is the first of these.
    """
    if grid.base.experiment.reference:
        return grid.base.experiment.reference
    without = all(label.method != REFERENCE for label in labels)
    return labels[0].name if without and len(grid.methods) == 1 and len(labels) > 1 else REFERENCE


def references_of(grid: Grid, labels: Sequence[Label]) -> list[str]:
    """Return the variants with which others are compared: the reference, or all variants of the reference method."""
    reference = reference_of(grid, labels)
    own = [label.name for label in labels if label.name == reference]
    return own or [label.name for label in labels if label.method == reference and not label.average]


def shortcut_in_words(shortcut: str | None, pre_num: int) -> str:
    """Return a shortcut in the paper's notation: `block(4)`, but `input`, which always uses one block.

    Empty without a shortcut.
    """
    return f"{shortcut}({pre_num})" if shortcut in SEVERAL_BLOCKS else shortcut or ""


def options_of(grid: Grid[O], label: Label, rate: float, seed: int) -> O:
    """Return an arm's options as the options of a single run."""
    own: dict[str, Any] = {**label.values, "learning_rate": rate, "seed": seed}
    if label.rank:
        own["rank"] = label.rank
    if label.shortcut or "shortcut" in grid.varied:
        own["shortcut"] = label.shortcut or PLAIN
    if label.pre_num is not None or "pre_num" in grid.varied:
        own["pre_num"] = next(filter(None, grid.values("pre_num")), 0) if label.pre_num is None else label.pre_num
    return grid.run(label.method, **own)


def check_values(grid: Grid) -> None:
    """Raise `InvalidArgument` for values that are given twice or have no effect."""
    for name, given in grid.varied.items():
        values = [in_folder(value) for value in given]
        if len(set(values)) < len(values):
            raise InvalidArgument(f"{grid.flag(name)} {' '.join(values)}", "one value is given twice", "give each once")
    labels = labels_of(grid)
    used = {name for label in labels for name in label.values} | {"learning_rate", "seed", "rank"}
    used |= {name for name in ("shortcut", "pre_num") for label in labels if getattr(label, name) is not None}
    for name in grid.varied:
        if name not in used:
            problem = f"no method of --method {' '.join(grid.methods)} uses several values"
            fix = "add reslora with --shortcut block or middle, or give one value"
            raise InvalidArgument(f"{grid.flag(name)} {as_typed(grid.varied[name])}", problem, fix)
    experiment = grid.base.experiment
    known = dict.fromkeys([*(label.name for label in labels), *grid.methods])
    if experiment.reference and experiment.reference not in known:
        problem = f"is not compared here{did_you_mean(experiment.reference, known)}"
        raise InvalidArgument(f"--reference {experiment.reference}", problem, f"give one of {', '.join(known)}")
    seeds = grid.values("seed")
    choosing = len(choosing_of(seeds, len(grid.rates)))
    arms = sum(len(rates_of(grid, label)) * choosing + len(seeds) - choosing for label in labels)
    check_at_once(experiment, arms)
    if experiment.extend_rates and len(grid.rates) == 1:
        raise InvalidArgument(
            "--extend_rates",
            "one learning rate has no next one",
            "give two or more for --learning_rate",
        )
    if experiment.extend_rates and any(len(rates_of(grid, label)) == 1 for label in labels):
        problem = "with --vary optimizer, an optimizer with a learning rate of its own has no next one"
        raise InvalidArgument("--extend_rates", problem, "leave it out")
    if experiment.extend_rates:
        rates = sorted(grid.rates)
        for low, high in (rates[:2], rates[-2:]):
            if high < LEAST_RATIO * low:  # the extended values, rounded, would be equal
                problem = "too near each other for --extend_rates, which continues the series by their ratio"
                raise InvalidArgument(f"--learning_rate {low:g} {high:g}", problem, "give rates further apart")


def check_at_once(options: SharedExperimentOptions, arms: int) -> None:
    """Raise `InvalidArgument` for more processes than arms, a launcher of several processes, and missing Ray."""
    processes = options.arms_at_once or 1
    flag = f"--arms_at_once {processes}" if options.executor == "local" else "--executor ray"
    if options.executor == "ray":
        require_package(flag, "ray")
    if (options.gpus_per_run or 0) > 1:
        raise InvalidArgument(f"--gpus_per_run {options.gpus_per_run:g}", "a run trains on one GPU", "give 1 at most")
    if processes > 1 and arms < processes:
        problem = f"the experiment has only {arms} runs"
        raise InvalidArgument(f"--arms_at_once {processes}", problem, f"give {arms} at most")
    if not options.in_this_process and "RANK" in os.environ:
        problem = "each run is trained by all processes that the launcher starts"
        raise InvalidArgument(flag, problem, "start the script with python, or leave it out")


def place_of(label: Label, arm: Arm) -> str:
    """Return the directory of an arm, relative to the directory of its method."""
    return f"{label.place}lr-{arm.rate:g}/seed-{arm.seed}"


def choosing_of(seeds: Sequence[int], rates: int) -> list[int]:
    """Return the seeds whose losses choose among `rates` learning rates: every fourth one, starting with the first.

    The losses of these seeds at the chosen learning rate are biased towards low values, because their seed noise
    influences the choice. With one choosing seed in four, training costs the least, and this bias hardly favors a
    method. An added seed does not change the roles of the others. With one learning rate there is nothing to choose,
    and all seeds are returned.
    """
    return list(seeds[:: EVERY if rates > 1 else 1])


# -- in which order ----------------------------------------------------------------------------------------------------


def in_order(grids: Grids, seeds: Sequence[int], losses: Losses) -> list[Arm]:
    """Return the arms in their order of training, as far as the losses determine it.

    Until all arms of the first seed have ended, only these are returned.
    """
    coarse = {label: coarse_to_fine(rates) for label, rates in grids.items()}
    first = arms_by_rate(coarse, seeds[0])
    if not all(arm in losses for arm in first):
        return first
    by_first = {label: {rate: losses[Arm(label, rate, seeds[0])] for rate in rates} for label, rates in grids.items()}
    near = {label: nearest(found)[:NEAR] for label, found in by_first.items()}
    order = [arm for rates in (near, coarse) for seed in seeds[1:] for arm in arms_by_rate(rates, seed)]
    return first + list(dict.fromkeys(order))


def arms_by_rate(rates: Mapping[str, Sequence[float]], seed: int) -> list[Arm]:
    """Return the arms of a seed: every method at its first learning rate, then every method at its second one, etc."""
    longest = max(map(len, rates.values()))
    return [
        Arm(label, own[place], seed) for place in range(longest) for label, own in rates.items() if place < len(own)
    ]


def coarse_to_fine(rates: Sequence[float]) -> list[float]:
    """Return the middle learning rate, then the middles of both halves, and so on."""
    spans, found = [sorted(rates)], []
    for span in spans:  # grows in the loop
        if span:
            middle = len(span) // 2
            found.append(span[middle])
            spans += [span[:middle], span[middle + 1 :]]
    return found


def nearest(losses: Mapping[float, float]) -> list[float]:
    """Return the learning rates, sorted by their distance in grid steps from the best one.

    Of two learning rates at the same distance, the one with the lower loss is first.
    """
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda rate: losses[rate]))
    return sorted(rates, key=lambda rate: (abs(rates.index(rate) - best), losses[rate]))


# -- more rates --------------------------------------------------------------------------------------------------------


def grown(grids: Grids, seeds: Sequence[int], losses: Losses) -> dict[str, list[float]]:
    """Return each method's learning rates, extended by one if needed (--extend_rates).

    If some methods have fewer learning rates than others, only these methods get one more. Otherwise all methods get
    one more if any method's best learning rate is its lowest or highest, and none if not. `losses` contains at least
    all arms of the first seed.
    """
    best = {label: best_rate(label, rates, seeds, losses) for label, rates in grids.items()}
    most = max(map(len, grids.values()))
    behind = any(len(rates) < most for rates in grids.values())
    at_end = any(best[label] in (rates[0], rates[-1]) for label, rates in grids.items())
    if not behind and not at_end:
        return {label: list(rates) for label, rates in grids.items()}
    wanted = most if behind else most + 1
    return {
        label: with_next(rates, best[label]) if len(rates) < wanted else list(rates) for label, rates in grids.items()
    }


def best_rate(label: str, rates: Sequence[float], seeds: Sequence[int], losses: Losses) -> float:
    """Return the learning rate with the lowest mean loss over the seeds that were trained at all learning rates."""
    common = [seed for seed in seeds if all(Arm(label, rate, seed) in losses for rate in rates)]
    return min(rates, key=lambda rate: sum(losses[Arm(label, rate, seed)] for seed in common))


def with_next(rates: Sequence[float], best: float) -> list[float]:
    """Return the learning rates and the next value of their geometric series, at the end nearer to the best one.

    If both ends are equally near, it is the upper end. The value is rounded to three digits for directory names.
    """
    place = list(rates).index(best)
    if 2 * place + 1 >= len(rates):
        return [*rates, rounded(rates[-1] * rates[-1] / rates[-2])]
    return [rounded(rates[0] * rates[0] / rates[1]), *rates]


def rounded(rate: float) -> float:
    """Return a learning rate rounded to three digits."""
    return float(f"{rate:.3g}")


def continued(rates: Sequence[float], there: Sequence[float]) -> list[float]:
    """Return `rates`, and the learning rates that --extend_rates has added in earlier starts of the experiment.

    `there`: the learning rates for which a directory exists.
    """
    found = list(rates)
    for _ in range(MOST_EXTENSIONS if len(rates) > 1 else 0):
        for end in (0, -1):
            longer = with_next(found, found[end])
            if any(math.isclose(longer[end], rate) for rate in there) and len(found) < len(rates) + MOST_EXTENSIONS:
                found = longer
    return found
