"""Which arms an experiment has, and in which order they are trained: functions of flags and results, no disk or model.

An arm is a label (a method, with its rank or shortcut where several are given) with a learning rate and a seed. The
order is the same with and without a limit in time, so that a limited experiment goes on as an unlimited one:

1. The first seed, over all rates and labels: rates coarse to fine, from the middle, and every label before the next
   rate, so that wherever it ends the labels had equally many trials, give or take one.
2. The other seeds, one after the other, at the NEAR rates around each label's optimum by the first seed, the best one
   first; as many for every label. A rate is then chosen among those that were tried with the most seeds, over these
   seeds together on the select images: the first seed's luck alone decides only what is tried, and for all alike.
3. Everything else.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..common.errors import InvalidArgument
from ..common.flags import Flags, listed
from ..common.methods import METHODS
from ..shortcuts import NAMES, PLAIN

NEAR = 3  # rates around the best one that further seeds are spent on first
SEVERAL_BLOCKS = tuple(name for name in NAMES if name not in (PLAIN, "input"))  # that --pre_num counts
MOST_EXTENSIONS = 3  # of the rates, by --extend_rates
LEAST_RATIO = 1.02  # of two rates that it goes on from


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


# -- from flags to arms ------------------------------------------------------------------------------------------------


def values_of(flags: Flags, name: str) -> list:
    """All values of a flag; None where it is still open."""
    return listed(getattr(flags, name)) or [None]


def labels_of(flags: Flags) -> list[Label]:
    """What is compared: of ResLoRA, and of LoRA that is matched with it, one for each shortcut."""
    found = []
    for method in flags.method:
        wired = METHODS[method].reads_shortcut and isinstance(flags.shortcut, list)
        for shortcut in flags.shortcut if wired else [None]:
            kind = shortcut or kind_of(flags, method)
            for pre_num in pre_nums_of(flags, kind):
                told = shortcut_in_words(shortcut, flags.pre_num) if pre_num is None else f"{kind}({pre_num})"
                folder = (f"{shortcut}/" if shortcut else "") + (f"pre_num-{pre_num}/" if pre_num is not None else "")
                for rank in flags.rank if isinstance(flags.rank, list) else [None]:
                    name = " ".join(filter(None, [method, told, f"rank {rank}" if rank else ""]))
                    place = folder + (f"rank-{rank}/" if rank else "")
                    found.append(Label(name, method, rank, shortcut, place, pre_num))
    return found


def kind_of(flags: Flags, method: str) -> str | None:
    """The shortcut that a method is wired by, or takes after, where all take the same."""
    return flags.shortcut if METHODS[method].reads_shortcut else METHODS[method].placebo


def pre_nums_of(flags: Flags, kind: str | None) -> list[int] | list[None]:
    """The numbers of blocks that make a difference: none where one is given, and without shortcuts from several."""
    return flags.pre_num if isinstance(flags.pre_num, list) and kind in SEVERAL_BLOCKS else [None]


def shortcut_in_words(shortcut: str | None, pre_num: int) -> str:
    """As the paper writes it: `block(4)`; `input` takes one block whatever the number is."""
    return f"{shortcut}({pre_num})" if shortcut in SEVERAL_BLOCKS else shortcut or ""


def flags_of(flags: Flags, label: Label, rate: float, seed: int) -> Flags:
    """The flags of a plain run of one arm."""
    rank = label.rank or flags.rank
    shortcut = label.shortcut or (PLAIN if isinstance(flags.shortcut, list) else flags.shortcut)
    pre_num = next(filter(None, listed(flags.pre_num)), 0) if label.pre_num is None else label.pre_num
    own = {"method": [label.method], "learning_rate": rate, "seed": seed, "rank": rank, "shortcut": shortcut}
    own["pre_num"] = pre_num
    return flags.replace(**own, lora_alpha=alpha_of(flags, rank))


def alpha_of(flags: Flags | argparse.Namespace, rank: int | list[int] | None) -> float | None:
    """The alpha that is given, or twice the rank; None where that, or a LoRA to go on from, will say it yet."""
    if flags.lora_alpha is not None:
        return flags.lora_alpha
    return 2 * rank if isinstance(rank, int) and not flags.init_lora else None


def check_values(flags: Flags, names: Mapping[str, str]) -> None:
    """Refuse values that are given twice or that nothing reads. `names`: the flags that take several, as typed."""
    for name, flag in names.items():
        values = [f"{value:g}" if name == "learning_rate" else str(value) for value in values_of(flags, name)]
        if len(set(values)) < len(values):
            raise InvalidArgument(f"--{flag} {' '.join(values)}", "the same one twice", "give each once")
    for name in ("shortcut", "pre_num"):
        values = getattr(flags, name)
        if isinstance(values, list) and all(getattr(label, name) is None for label in labels_of(flags)):
            problem = f"nothing of --method {' '.join(flags.method)} reads several"
            fix = "add reslora with --shortcut block or middle, or give one"
            raise InvalidArgument(f"--{name} {' '.join(map(str, values))}", problem, fix)
    check_at_once(flags)
    if flags.extend_rates and not isinstance(flags.learning_rate, list):
        raise InvalidArgument("--extend_rates", "one rate says no next one", "give two or more as --learning_rate")
    if flags.extend_rates:
        rates = sorted(flags.learning_rate)
        for low, high in (rates[:2], rates[-2:]):
            if high < LEAST_RATIO * low:  # the next ones, rounded, would be the same
                problem = "too near each other for --extend_rates, which goes on by their ratio"
                raise InvalidArgument(f"--learning_rate {low:g} {high:g}", problem, "give rates further apart")


def check_at_once(flags: Flags) -> None:
    """Refuse more processes than there are arms, and any below a launcher that has made this one of a group."""
    if (flags.arms_at_once or 1) == 1:
        return
    arms = len(labels_of(flags)) * len(values_of(flags, "learning_rate")) * len(values_of(flags, "seed"))
    if arms < flags.arms_at_once:
        raise InvalidArgument(f"--arms_at_once {flags.arms_at_once}", f"these are {arms} arms", f"give {arms} at most")
    if "RANK" in os.environ:
        problem = "each arm is trained by all processes that the launcher starts"
        raise InvalidArgument(f"--arms_at_once {flags.arms_at_once}", problem, "start one by python, or leave it out")


def place_of(label: Label, arm: Arm) -> str:
    """The folder of an arm inside that of its method."""
    return f"{label.place}lr-{arm.rate:g}/seed-{arm.seed}"


# -- in which order ----------------------------------------------------------------------------------------------------


def in_order(grids: Grids, seeds: Sequence[int], losses: Losses) -> list[Arm]:
    """The arms in the order in which they are trained, as far as the losses say it already.

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
    """The arms of a seed: every label at its first rate, then every label at its second."""
    longest = max(map(len, rates.values()))
    return [
        Arm(label, own[place], seed) for place in range(longest) for label, own in rates.items() if place < len(own)
    ]


def coarse_to_fine(rates: Sequence[float]) -> list[float]:
    """The middle one, then the middles of both halves, and so on."""
    spans, found = [sorted(rates)], []
    for span in spans:  # which grows meanwhile
        if span:
            middle = len(span) // 2
            found.append(span[middle])
            spans += [span[:middle], span[middle + 1 :]]
    return found


def nearest(losses: Mapping[float, float]) -> list[float]:
    """The rates by how many steps of the grid they are away from the best one; of two that are as far, the better."""
    rates = sorted(losses)
    best = rates.index(min(rates, key=lambda rate: losses[rate]))
    return sorted(rates, key=lambda rate: (abs(rates.index(rate) - best), losses[rate]))


# -- more rates --------------------------------------------------------------------------------------------------------


def grown(grids: Grids, seeds: Sequence[int], losses: Losses) -> dict[str, list[float]]:
    """The rates with one more of each label, if the best one of any is the lowest or highest that was tried.

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
    """The rate with the lowest mean loss over the seeds that all rates were tried with."""
    common = [seed for seed in seeds if all(Arm(label, rate, seed) in losses for rate in rates)]
    return min(rates, key=lambda rate: sum(losses[Arm(label, rate, seed)] for seed in common))


def with_next(rates: Sequence[float], best: float) -> list[float]:
    """The rates with the next one of their geometric row, at the end that the best one is nearer to; the upper of two.

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
    """The rates with what earlier extensions have added of their row: those of the next ones that are `there`."""
    found = list(rates)
    for _ in range(MOST_EXTENSIONS if len(rates) > 1 else 0):
        for end in (0, -1):
            longer = with_next(found, found[end])
            if any(math.isclose(longer[end], rate) for rate in there) and len(found) < len(rates) + MOST_EXTENSIONS:
                found = longer
    return found
