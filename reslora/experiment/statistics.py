"""Whether a method's difference to the reference is real: for new seeds and new images, and for all methods together.

d[s, i] is a method's loss minus the reference's for seed s (initialisation, order and noise, alike for both) and test
image i. Both are random and crossed. Lower losses are better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.optimize import brentq

from ..words import are
from .record import Arm, Choice, TestLosses, Verdict

REFERENCE = "lora"
"""The method that all are compared with."""
LEVEL = 0.05
"""How often an experiment without any difference may claim one, at the most."""
POWER = 0.8
SIMULATED = 4000
"""Experiments behind a power."""
LEAST_P = 1e-12
"""A p value is not told below."""
LARGEST_STEP = 10
"""From the best rate to the next one where the rate beside it says none."""


# -- one method beside the reference -----------------------------------------------------------------------------------


class Spread(NamedTuple):
    """How differences vary between seeds, between images, and beyond both."""

    squares: np.ndarray
    """The three mean squares, 3 x any shape of experiments."""
    degrees: np.ndarray
    """Their degrees of freedom, 3."""

    @property
    def differences(self) -> float:
        """How many there are: seeds times images."""
        return (self.degrees[0] + 1) * (self.degrees[1] + 1)


def spread_of(differences: np.ndarray) -> Spread:
    """The mean squares of differences ... x seeds x images, of which there are at least two each."""
    seeds, images = differences.shape[-2:]
    mean = differences.mean((-2, -1), keepdims=True)
    by_seed = differences.mean(-1, keepdims=True) - mean
    by_image = differences.mean(-2, keepdims=True) - mean
    parts = by_seed, by_image, differences - mean - by_seed - by_image
    degrees = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)], float)
    repeats = images, seeds, 1
    sums = [n * np.square(part).sum((-2, -1)) for n, part in zip(repeats, parts, strict=True)]
    return Spread(np.stack([total / df for total, df in zip(sums, degrees, strict=True)]), degrees)


def half_width(spread: Spread, level: float) -> np.ndarray:
    """Half the width of the interval of a mean difference at 1 - level.

    Each mean square is multiplied by the square of Student's t of its own degrees of freedom (Banerjee, 1961); they
    are summed as in the variance of the mean, max(MS_s + MS_i - MS_e, MS_s, MS_i) / (S I). One t for the whole sum,
    with Satterthwaite's degrees of freedom, claims too much at the levels that Holm's correction asks of few seeds:
    see benchmarks/experiment_statistics.py.
    """
    students = np.square(special.stdtrit(spread.degrees, level / 2))
    seeds, images, rest = (t * square for t, square in zip(students, spread.squares, strict=True))
    return np.sqrt(_sum(seeds, images, rest) / spread.differences)


def _sum(seeds: np.ndarray, images: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return np.maximum(seeds + images - rest, np.maximum(seeds, images))


def p_value(difference: float, spread: Spread) -> float:
    """The level at which the interval of a mean difference just reaches zero; `LEAST_P` at least."""
    if difference == 0:
        return 1.0

    def beyond(log_level: float) -> float:
        return float(half_width(spread, math.exp(log_level))) - abs(difference)

    least = math.log(LEAST_P)
    return LEAST_P if beyond(least) <= 0 else math.exp(brentq(beyond, least, 0))


def detectable(spread: Spread, level: float) -> float:
    """The smallest true difference that experiments spread like this one show in four of five cases.

    A mean square of few degrees of freedom is more often below the truth than above it: what is taken for true is
    that of which this one is the median.
    """
    degrees = spread.degrees
    true = spread.squares * degrees / special.chdtri(degrees, 0.5)
    deviation = float(np.sqrt(_sum(*true) / spread.differences))
    if deviation == 0:
        return 0.0
    drawn = np.random.default_rng(0).chisquare(degrees[:, None], (3, SIMULATED)) / degrees[:, None]
    needed = half_width(Spread(drawn * true[:, None], degrees), level)

    def lacking(difference: float) -> float:
        return POWER - float(special.ndtr((difference - needed) / deviation).mean())

    return brentq(lacking, 0, needed.max() + 3 * deviation)


def rerun(values: ArrayLike, least: float = -math.inf) -> tuple[float, float] | None:
    """Where one more value lies at 95%, by Student's t, if it varies as these do; None of fewer than two.

    The values are one a seed: losses, of which the `least` is 0, or differences, on images that stay the same. A mean's
    interval says where the mean of all seeds is; this one is wider, by what a single seed differs from it.
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        return None
    half = -special.stdtrit(len(found) - 1, LEVEL / 2) * found.std(ddof=1) * math.sqrt(1 + 1 / len(found))
    return max(float(found.mean() - half), least), float(found.mean() + half)


# -- all methods -------------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted


class Comparison(NamedTuple):
    """A label beside the reference on the seeds that both have."""

    label: str
    reference: str
    differences: np.ndarray
    """Seeds x images."""
    base: float
    """The reference's mean loss."""
    missing: int
    """Seeds that one of them lacks."""

    @property
    def telling(self) -> bool:
        """Whether there is anything to estimate a spread from."""
        return min(self.differences.shape) > 1


def verdicts(losses: Mapping[str, ArrayLike], references: Mapping[str, str], unit: str = "image") -> list[Verdict]:
    """What is to be said of each label of `references` beside its reference, by their losses on the test images.

    `losses` holds seeds x images for each label; the same seeds and images in all. A seed that a label lacks is a row
    that is not finite, and is left out of its comparison; a label without a seed in common with its reference has no
    verdict. `unit`: what an image is, in words. Raises `ValueError` for arrays of other shapes, and for losses that
    are not above zero.
    """
    arrays = {label: np.asarray(values, float) for label, values in losses.items()}
    expected = next(iter(arrays.values())).shape if arrays else ()
    for label, values in arrays.items():
        if values.shape != expected or values.ndim != 2 or 0 in expected:
            raise ValueError(
                f"{label} has losses of shape {values.shape}, not seeds x images alike for all: {expected}"
            )
        if (values <= 0).any():
            raise ValueError(f"{label} has a test loss of {np.nanmin(values):g}, and a loss is above zero")
    found = [_compared(*pair, arrays) for pair in references.items()]
    found = [each for each in found if len(each.differences)]
    telling = [each for each in found if each.telling]
    p_values = [p_value(float(each.differences.mean()), spread_of(each.differences)) for each in telling]
    adjusted = dict(zip((each.label for each in telling), zip(p_values, holm(p_values), strict=True), strict=True))
    return [_verdict(each, adjusted.get(each.label), len(telling), unit) for each in found]


def _compared(label: str, reference: str, arrays: Mapping[str, np.ndarray]) -> Comparison:
    ours, theirs = arrays[label], arrays[reference]
    both = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    base = theirs[both].mean() if both.any() else math.nan
    return Comparison(label, reference, (ours - theirs)[both], float(base), int((~both).sum()))


def _verdict(comparison: Comparison, p: tuple[float, float] | None, methods: int, unit: str) -> Verdict:
    label, reference, differences, base, _ = comparison
    mean, percent = float(differences.mean()), 100 / base
    seeds, images = differences.shape
    found = Verdict(
        label=label, reference=reference, seeds=seeds, images=images, conclusion="cannot tell", sentence="",
        difference=mean, relative=percent * mean, interval=None, rerun=rerun(percent * differences.mean(1)),
        p=None, p_holm=None, detectable=None,
    )  # fmt: skip
    if p is not None:
        spread = spread_of(differences)
        half = float(half_width(spread, LEVEL))
        found["interval"] = percent * (mean - half), percent * (mean + half)
        found["p"], found["p_holm"] = p
        found["detectable"] = percent * detectable(spread, LEVEL / methods)
        found["conclusion"] = "not shown" if p[1] >= LEVEL else "better" if mean < 0 else "worse"
    found["sentence"] = _sentence(found, comparison, unit)
    return found


def _sentence(verdict: Verdict, comparison: Comparison, unit: str) -> str:
    """The verdict in plain words."""
    label, reference, relative = verdict["label"], verdict["reference"], verdict["relative"]
    towards = "lower" if relative < 0 else "higher"
    if verdict["interval"] is None or verdict["detectable"] is None or verdict["p"] is None:
        few = "one seed" if verdict["seeds"] == 1 else f"one test {unit}"
        (size,) = percents(relative)
        sentence = f"{few} cannot tell {label} from {reference}: test loss {size}% {towards}, which may be luck"
    elif not comparison.differences.any():
        sentence = f"{label} and {reference} have the same test losses"
    elif verdict["conclusion"] == "not shown":
        among = " when all comparisons are counted" if verdict["p"] < LEVEL else ""
        (size,) = percents(verdict["detectable"])
        sentence = f"no difference between {label} and {reference} shown{among} (could have shown {size}%)"
    else:
        size, least, most = percents(relative, *sorted(map(abs, verdict["interval"])))
        sentence = (
            f"{label} is {verdict['conclusion']} than {reference}: test loss {size}% {towards} "
            f"(95% interval {least} to {most}%)"
        )
    if comparison.missing:
        missing = comparison.missing
        sentence += f"; {missing} of {missing + verdict['seeds']} seeds {are(missing)} missing"
    return sentence


def percents(*values: float) -> list[str]:
    """Sizes with so many places, one to four, that the smallest of them still says something."""
    smallest = min((abs(value) for value in values if value), default=1)
    places = min(4, max(1, -math.floor(math.log10(smallest))))
    return [f"{abs(value):.{places}f}" for value in values]


# -- from the record ---------------------------------------------------------------------------------------------------


def compare(arms: Iterable[Arm], chosen: Mapping[str, Choice], unit: str = "image") -> list[Verdict]:
    """A verdict for each label, from the test losses of its arms at the chosen rate.

    The reference is LoRA: of the same rank where there are several, which are compared with the first of them. Raises
    `ValueError` if arms were measured on different images.
    """
    judged = [arm for arm in arms if arm["test"] and is_chosen(arm, chosen)]
    ranks = {arm["label"]: arm["rank"] for arm in judged}
    lora = list(dict.fromkeys(arm["label"] for arm in judged if arm["method"] == REFERENCE))
    same_rank = {label: [each for each in lora if each != label and ranks[each] == ranks[label]] for label in ranks}
    references = {label: (same_rank[label] + lora)[0] for label in ranks if lora and label != lora[0]}
    return verdicts(tested(judged, chosen), references, unit)


def tested(arms: Iterable[Arm], chosen: Mapping[str, Choice]) -> dict[str, np.ndarray]:
    """Test losses of each label at its chosen rate, seeds x images; NaN where a label lacks a seed that another has.

    Raises `ValueError` if arms were measured on different images.
    """
    tests: dict[str, dict[int, TestLosses]] = {}
    for arm in arms:
        if (test := arm["test"]) and is_chosen(arm, chosen):
            tests.setdefault(arm["label"], {})[arm["seed"]] = test
    return _crossed(tests)


def is_chosen(arm: Arm, chosen: Mapping[str, Choice]) -> bool:
    """Whether an arm was trained at its label's chosen rate."""
    label = arm["label"]
    return label in chosen and arm["learning_rate"] == chosen[label]["learning_rate"]


def _crossed(tests: Mapping[str, Mapping[int, TestLosses]]) -> dict[str, np.ndarray]:
    """Seeds x images for each label, NaN where there is no loss."""
    all_tests = [test for by_seed in tests.values() for test in by_seed.values()]
    if any(test["images"] != all_tests[0]["images"] for test in all_tests):
        raise ValueError("arms were measured on different test images, which cannot be compared")
    seeds = sorted({seed for by_seed in tests.values() for seed in by_seed})
    found = {}
    for label, by_seed in tests.items():
        rows = [by_seed[seed]["losses"] if seed in by_seed else [None] * len(all_tests[0]["images"]) for seed in seeds]
        found[label] = np.array(rows, float)  # None becomes NaN
    return found


def choose(arms: Iterable[Arm]) -> dict[str, Choice]:
    """Each label's rate and checkpoint: those whose loss on the select images is lowest, over its seeds together.

    Of the arms that have ended. A rate that fewer seeds ended with than with another is left out. Nothing is chosen
    where a seed failed or its loss is not finite, and a label of which nothing is left has no choice.
    """
    losses: dict[str, dict[float, list[Mapping[str, float | None]]]] = {}
    for arm in arms:
        seeds = losses.setdefault(arm["label"], {}).setdefault(arm["learning_rate"], [])
        if arm["status"] in ("finished", "failed"):
            seeds.append(arm["select_by_step"] if arm["status"] == "finished" else {})
    choices = {label: choice(by_rate) for label, by_rate in losses.items()}
    return {label: found for label, found in choices.items() if found is not None}


def choice(losses: Mapping[float, Sequence[Mapping[str, float | None]]]) -> Choice | None:
    """The choice of one label from `select_by_step` of each seed, for each rate; None where no loss is finite.

    Rates with fewer seeds than others are left out. If the best one is at an end of all, whether trained yet or
    not, and the one beside it was tried, the next rate continues them by the same ratio, or by LARGEST_STEP where that
    is less and the rate beside it has no loss: it may be far too high.
    """
    most = max(map(len, losses.values()), default=0)
    tried = sorted(rate for rate, seeds in losses.items() if len(seeds) == most > 0)
    means: dict[tuple[float, int], float] = {}
    for rate in tried:
        for step in set(losses[rate][0]).intersection(*losses[rate]):
            values = np.array([seed[step] for seed in losses[rate]], float)
            if np.isfinite(values).all():
                means[rate, int(step)] = float(values.mean())
    if not means:
        return None
    best, at = min(means, key=lambda key: (means[key], key))
    found = Choice(learning_rate=best, step=at, loss=means[best, at], at_end=None, next=None)
    rates = sorted(losses)
    neighbour = {rates[0]: rates[1], rates[-1]: rates[-2]}.get(best) if len(rates) > 1 else None
    if neighbour and losses[neighbour]:
        found["at_end"] = "low" if best == rates[0] else "high"
        ratio = best / neighbour
        if neighbour in tried and all(rate != neighbour for rate, _ in means):
            ratio = min(max(ratio, 1 / LARGEST_STEP), LARGEST_STEP)
        found["next"] = float(f"{best * ratio:.3g}")  # as folders name it
    return found
