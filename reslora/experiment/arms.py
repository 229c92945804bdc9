"""Which arms an experiment has, and in which order they are trained: functions of options and results only.

An arm is a label (a method, with its rank or shortcut where several are given) with a learning rate and a seed. The
order is the same with and without a limit in time, so that a limited experiment goes on as an unlimited one:

1. The first seed, over all rates and labels: rates coarse to fine, from the middle, and every label before the next
   rate, so that wherever it ends the labels had equally many trials, give or take one.
2. The other seeds that choose rates, one after the other, at the NEAR rates around each label's optimum by the first
   seed, the best one first; as many for every label. Then these seeds at all other rates.
3. The seeds that choose nothing, one after the other, at each label's chosen rate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import InvalidArgument
from ..common.flags import as_typed
from ..common.methods import METHODS
from ..options.grid import Grid, O
from ..shortcuts import NAMES, PLAIN

NEAR = 3  # rates around the best one that further seeds are spent on first
SEVERAL_BLOCKS = tuple(name for name in NAMES if name not in (PLAIN, "input"))  # that --pre_num counts
MOST_EXTENSIONS = 3  # of the rates, by --extend_rates
LEAST_RATIO = 1.02  # of two rates that it goes on from
EVERY = 4  # of so many seeds the first one chooses rates, where there are several


@dataclass(frozen=True)
class Label:
    """What is compared: a method, with its rank, shortcut and number of blocks where several are given."""

    name: str
    method: str
    rank: int | None
    """None where one is given for all, as the next one."""
    shortcut: str | None
    place: str = ""
    """What stands before the rate in the names of folders."""
    pre_num: int | None = None


@dataclass(frozen=True)
class Arm:
    """One training."""

    label: str
    rate: float
    seed: int


Grids = Mapping[str, Sequence[float]]
"""The rates of each label, from the lowest to the highest."""
Losses = Mapping[Arm, float]
"""On the select images, at the best checkpoint, of every arm that has ended; infinite where it has diverged."""


# -- from options to arms ----------------------------------------------------------------------------------------------


def labels_of(grid: Grid) -> list[Label]:
    """Return what is compared: of ResLoRA, and of LoRA that is matched with it, one for each shortcut."""
    found, shared, varied = [], grid.base.adapter, grid.varied
    for method in grid.methods:
        row = METHODS[method]
        for shortcut in varied.get("shortcut", [None]) if row.reads_shortcut else [None]:
            kind = shortcut or (shared.shortcut if row.reads_shortcut else row.placebo)
            for pre_num in varied.get("pre_num", [None]) if kind in SEVERAL_BLOCKS else [None]:
                told = shortcut_in_words(shortcut, shared.pre_num) if pre_num is None else f"{kind}({pre_num})"
                folder = (f"{shortcut}/" if shortcut else "") + (f"pre_num-{pre_num}/" if pre_num is not None else "")
                for rank in varied.get("rank", [None]):
                    name = " ".join(filter(None, [method, told, f"rank {rank}" if rank else ""]))
                    place = folder + (f"rank-{rank}/" if rank else "")
                    found.append(Label(name, method, rank, shortcut, place, pre_num))
    return found


def shortcut_in_words(shortcut: str | None, pre_num: int) -> str:
    """As the paper writes it: `block(4)`; `input` takes one block whatever the number is."""
    return f"{shortcut}({pre_num})" if shortcut in SEVERAL_BLOCKS else shortcut or ""


def options_of(grid: Grid[O], label: Label, rate: float, seed: int) -> O:
    """Return the options of a plain run of one arm."""
    own: dict[str, Any] = {"learning_rate": rate, "seed": seed}
    if label.rank:
        own["rank"] = label.rank
    if label.shortcut or "shortcut" in grid.varied:
        own["shortcut"] = label.shortcut or PLAIN
    if label.pre_num is not None or "pre_num" in grid.varied:
        own["pre_num"] = next(filter(None, grid.values("pre_num")), 0) if label.pre_num is None else label.pre_num
    return grid.run(label.method, **own)


def check_values(grid: Grid) -> None:
    """Refuse values that are given twice or that nothing reads."""
    for name, given in grid.varied.items():
        values = [f"{value:g}" if name == "learning_rate" else str(value) for value in given]
        if len(set(values)) < len(values):
            raise InvalidArgument(f"{grid.flag(name)} {' '.join(values)}", "the same one twice", "give each once")
    labels = labels_of(grid)
    for name in ("shortcut", "pre_num"):
        if name in grid.varied and all(getattr(label, name) is None for label in labels):
            problem = f"nothing of --method {' '.join(grid.methods)} reads several"
            fix = "add reslora with --shortcut block or middle, or give one"
            raise InvalidArgument(f"{grid.flag(name)} {as_typed(grid.varied[name])}", problem, fix)
    experiment = grid.base.experiment
    seeds = grid.values("seed")
    choosing = len(choosing_of(seeds, len(grid.rates)))
    check_at_once(experiment.arms_at_once or 1, len(labels) * (len(grid.rates) * choosing + len(seeds) - choosing))
    if experiment.extend_rates and len(grid.rates) == 1:
        raise InvalidArgument("--extend_rates", "one rate says no next one", "give two or more as --learning_rate")
    if experiment.extend_rates:
        rates = sorted(grid.rates)
        for low, high in (rates[:2], rates[-2:]):
            if high < LEAST_RATIO * low:  # the next ones, rounded, would be the same
                problem = "too near each other for --extend_rates, which goes on by their ratio"
                raise InvalidArgument(f"--learning_rate {low:g} {high:g}", problem, "give rates further apart")


def check_at_once(processes: int, arms: int) -> None:
    """Refuse more processes than there are arms, and any below a launcher that has made this one of a group."""
    flag = f"--arms_at_once {processes}"
    if processes > 1 and arms < processes:
        raise InvalidArgument(flag, f"these are {arms} arms", f"give {arms} at most")
    if processes > 1 and "RANK" in os.environ:
        problem = "each arm is trained by all processes that the launcher starts"
        raise InvalidArgument(flag, problem, "start one by python, or leave it out")


def place_of(label: Label, arm: Arm) -> str:
    """Return the folder of an arm inside that of its method."""
    return f"{label.place}lr-{arm.rate:g}/seed-{arm.seed}"


def choosing_of(seeds: Sequence[int], rates: int) -> list[int]:
    """Return the seeds that choose among so many learning rates.

    A seed that chooses is lucky at the rate that it chooses. As one of four, and the first, it costs least and hardly
    favors a method; a seed that is added leaves the others as they are. With one rate there is nothing to choose.
    """
    return list(seeds[:: EVERY if rates > 1 else 1])


# -- in which order ----------------------------------------------------------------------------------------------------


def in_order(grids: Grids, seeds: Sequence[int], losses: Losses) -> list[Arm]:
    """Return the arms in the order in which they are trained, as far as the losses say it already.

    Until all arms of the first seed have ended, these alone.
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
    """Return the arms of a seed: every label at its first rate, then every label at its second."""
    longest = max(map(len, rates.values()))
    return [
        Arm(label, own[place], seed) for place in range(longest) for label, own in rates.items() if place < len(own)
    ]


def coarse_to_fine(rates: Sequence[float]) -> list[float]:
    """Return the middle one, then the middles of both halves, and so on."""
    spans, found = [sorted(rates)], []
    for span in spans:  # which grows meanwhile
        if span:
            middle = len(span) // 2
            found.append(span[middle])
            spans += [span[:middle], span[middle + 1 :]]
    return found


def nearest(losses: Mapping[float, float]) -> list[float]:
    """Return the rates by how many steps of the grid they are away from the best one; of two that are as far, the
    better.
    """
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda rate: losses[rate]))
    return sorted(rates, key=lambda rate: (abs(rates.index(rate) - best), losses[rate]))


# -- more rates --------------------------------------------------------------------------------------------------------


def grown(grids: Grids, seeds: Sequence[int], losses: Losses) -> dict[str, list[float]]:
    """Return the rates with one more of each label, if the best one of any is the lowest or highest that was tried.

    Labels that have fewer than others catch up first, so that all have equally many. The same grids come back where
    every optimum is inside. `losses`: of all arms of at least the first seed.
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
    """Return the rate with the lowest mean loss over the seeds that all rates were tried with."""
    common = [seed for seed in seeds if all(Arm(label, rate, seed) in losses for rate in rates)]
    return min(rates, key=lambda rate: sum(losses[Arm(label, rate, seed)] for seed in common))


def with_next(rates: Sequence[float], best: float) -> list[float]:
    """Return the rates with the next one of their geometric row, at the end that the best one is nearer to; the upper
    of two.

    It is rounded to three digits, so that it can be named.
    """
    place = list(rates).index(best)
    if 2 * place + 1 >= len(rates):
        return [*rates, rounded(rates[-1] * rates[-1] / rates[-2])]
    return [rounded(rates[0] * rates[0] / rates[1]), *rates]


def rounded(rate: float) -> float:
    """To three digits."""
    return float(f"{rate:.3g}")


def continued(rates: Sequence[float], there: Sequence[float]) -> list[float]:
    """Return the learning rates and those of their row that are `there`, which earlier extensions have added."""
    found = list(rates)
    for _ in range(MOST_EXTENSIONS if len(rates) > 1 else 0):
        for end in (0, -1):
            longer = with_next(found, found[end])
            if any(math.isclose(longer[end], rate) for rate in there) and len(found) < len(rates) + MOST_EXTENSIONS:
                found = longer
    return found
