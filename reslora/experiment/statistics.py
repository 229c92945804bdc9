"""Whether a difference between methods is real: for new seeds and new images, and for all methods together.

d[s, i] is a method's loss minus another's for seed s (initialization, order and noise, the same for both) and test
image i. Both are random and crossed. Lower losses are better. benchmarks/experiment_statistics.py simulates how often
these verdicts are wrong.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.optimize import brentq

from ..formatting import is_or_are
from .record import Arm, Choice, Ranking, TestLosses, Verdict, Worse

REFERENCE = "lora"
"""The method that all are compared with."""
LEVEL = 0.05
"""How often an experiment without any difference may claim one, at the most, however often it is extended."""
PRIOR = 2.5
"""Degrees of freedom that the spread of all methods adds to that of a pair, at the most."""
POWER = 0.8
SIMULATED = 4000
"""Experiments behind a power."""
LEAST_P = 1e-12
"""A p value is not given below."""
LARGEST_STEP = 10
"""From the best rate to the next one where the rate beside it says none."""


def level_of(reading: int) -> float:
    """Return the level at which the k-th reading of the test split is judged: LEVEL x 6 / (pi k)^2.

    Whoever adds seeds until a difference is significant has as many chances as readings, so each spends a part of
    LEVEL. All of them together, however many, spend LEVEL.
    """
    return LEVEL * 6 / (math.pi * reading) ** 2


# -- two methods -------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """How differences vary between seeds, between images, and beyond both."""

    squares: np.ndarray
    """The three mean squares, 3 x any shape of experiments."""
    degrees: np.ndarray
    """Their degrees of freedom, 3."""
    number: int
    """How many differences there are: seeds times images."""

    @property
    def error(self) -> np.ndarray:
        """The standard error of the mean difference."""
        return np.sqrt(_sum(*self.squares) / self.number)


def spread_of(differences: np.ndarray) -> Spread:
    """Return the mean squares of differences ... x seeds x images, of which there are at least two each."""
    seeds, images = differences.shape[-2:]
    mean = differences.mean((-2, -1), keepdims=True)
    by_seed = differences.mean(-1, keepdims=True) - mean
    by_image = differences.mean(-2, keepdims=True) - mean
    parts = by_seed, by_image, differences - mean - by_seed - by_image
    degrees = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)], float)
    repeats = images, seeds, 1
    sums = [n * np.square(part).sum((-2, -1)) for n, part in zip(repeats, parts, strict=True)]
    return Spread(np.stack([total / df for total, df in zip(sums, degrees, strict=True)]), degrees, seeds * images)


def moderated(spread: Spread, shared: np.ndarray | float, labels: int) -> Spread:
    """Return a pair's spread with its mean square of seeds shrunk toward `shared`, the mean of all pairs of labels.

    Few seeds say little about how much seeds differ, and that is much the same for all methods (limma does so for
    genes: Smyth, 2004). The mean of all pairs has (labels - 1) x (seeds - 1) degrees of freedom, of which PRIOR are
    added at the most: more would claim too much of a method that spreads three times as much as the others.
    """
    own = spread.degrees[0]
    more = min(PRIOR, (labels - 2) * own)
    seeds = (own * spread.squares[0] + more * shared) / (own + more)
    return Spread(np.stack([seeds, *spread.squares[1:]]), np.array([own + more, *spread.degrees[1:]]), spread.number)


def half_width(spread: Spread, level: float) -> np.ndarray:
    """Return half the width of the interval of a mean difference at 1 - level.

    Each mean square is multiplied by the square of Student's t of its own degrees of freedom (Banerjee, 1961); they
    are summed as in the variance of the mean, max(MS_s + MS_i - MS_e, MS_s, MS_i) / (S I). One t for the whole sum,
    with Satterthwaite's degrees of freedom, claims too much at the levels that a correction asks of few seeds.
    """
    students = np.square(special.stdtrit(spread.degrees, level / 2))
    return np.sqrt(_sum(*(t * square for t, square in zip(students, spread.squares, strict=True))) / spread.number)


def _sum(seeds: np.ndarray, images: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return np.maximum(seeds + images - rest, np.maximum(seeds, images))


def p_value(difference: float, spread: Spread) -> float:
    """Return the level at which the interval of a mean difference just reaches zero; `LEAST_P` at least."""
    if difference == 0:
        return 1.0

    def beyond(log_level: float) -> float:
        return float(half_width(spread, math.exp(log_level))) - abs(difference)

    least = math.log(LEAST_P)
    return LEAST_P if beyond(least) <= 0 else math.exp(brentq(beyond, least, 0))


def detectable(spread: Spread, level: float) -> float:
    """Return the true difference that an experiment of this size finds in four of five cases.

    What the true mean squares are is as uncertain as their degrees of freedom say (fiducial draws), so that the power
    is 80% on average over what experiments report, not only where an experiment happens to know its spread.
    """
    degrees, random = spread.degrees, np.random.default_rng(0)
    chances, again = random.chisquare(degrees[:, None], (2, 3, SIMULATED)) / degrees[:, None]
    true = spread.squares[:, None] / chances
    error = np.sqrt(_sum(*true) / spread.number)
    if not error.any():
        return 0.0
    needed = half_width(Spread(again * true, degrees, spread.number), level)

    def lacking(difference: float) -> float:
        return POWER - float(special.ndtr((difference - needed) / error).mean())

    return brentq(lacking, 0, float((needed + 3 * error).max()))


def expected(difference: float, spread: Spread, level: float) -> float:
    """Return what a significant difference leads to expect of new experiments: less, as only large ones get claimed.

    It is the mean of the true difference given this one, and given that it is beyond the half width at `level`.
    """
    size, error = abs(difference), float(spread.error)
    if error == 0:
        return difference
    true = np.linspace(0, size + 4 * error, 400)
    claimed = special.ndtr((true - float(half_width(spread, level))) / error)
    weights = np.exp(-np.square((size - true) / error) / 2) / claimed
    return math.copysign(float((weights * true).sum() / weights.sum()), difference)


def rerun(values: ArrayLike, least: float = -math.inf) -> tuple[float, float] | None:
    """Return where one more value is at 95%, by Student's t, if it varies as these do; None of fewer than two.

    The values are one a seed: losses, of which the `least` is 0, or differences, on images that stay the same. A mean's
    interval says where the mean of all seeds is; this one is wider, by what a single seed differs from it.
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        return None
    half = -special.stdtrit(len(found) - 1, LEVEL / 2) * found.std(ddof=1) * math.sqrt(1 + 1 / len(found))
    return max(float(found.mean() - half), least), float(found.mean() + half)


# -- all methods -------------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float], counts: Sequence[int] = ()) -> list[float]:
    """Return Holm's adjusted p values (1979), in the order given.

    `counts`: how many hypotheses may be true after 0, 1, 2 ... were rejected; without any, all that are left.
    """
    counts = counts or range(len(p_values), 0, -1)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for count, number in zip(counts, np.argsort(p_values, kind="stable"), strict=True):
        largest = max(largest, min(1.0, count * p_values[number]))
        adjusted[number] = largest
    return adjusted


@functools.cache
def equal_pairs(labels: int) -> frozenset[int]:
    """Return how many of all pairs of so many labels may be equal at once: with three 0, 1 or 3, but not 2."""
    if not labels:
        return frozenset({0})
    groups = ((math.comb(size, 2), equal_pairs(labels - size)) for size in range(1, labels + 1))
    return frozenset(own + others for own, rest in groups for others in rest)


def counts_of(pairs: int, labels: int) -> list[int]:
    """Return Holm's counts for the pairs of so many labels (Shaffer, 1986); plain ones where a pair is missing."""
    if pairs != math.comb(labels, 2):
        return list(range(pairs, 0, -1))
    return [max(count for count in equal_pairs(labels) if count <= left) for left in range(pairs, 0, -1)]


class Pair(NamedTuple):
    """A label and what it is compared with, on the seeds that both have."""

    label: str
    reference: str
    differences: np.ndarray
    """Seeds x images."""
    base: float
    """The reference's mean loss."""
    missing: int
    """Seeds that one of them lacks."""

    @property
    def mean(self) -> float:
        """The mean difference."""
        return float(self.differences.mean())

    @property
    def known(self) -> bool:
        """Whether there is anything to estimate a spread from."""
        return min(self.differences.shape) > 1


class Judged(NamedTuple):
    """A pair, tested."""

    pair: Pair
    spread: Spread
    p: float
    corrected: float
    """p for all pairs and all readings: significant below LEVEL."""
    level: float
    """The one at which Holm's procedure tests this pair."""
    reading_level: float

    @property
    def significant(self) -> bool:
        """Whether the difference is."""
        return self.corrected < LEVEL


Arrays = Mapping[str, np.ndarray]
"""Seeds x images for each label."""


def judge(arrays: Arrays, pairs: Iterable[tuple[str, str]], reading: int = 1) -> list[Judged | Pair]:
    """Return each pair of labels, tested and corrected for all pairs and for this being the k-th reading.

    Without a test where both have one seed or one image only; a pair without a common seed is left out.
    """
    found = [pair for each in pairs if len((pair := pair_of(*each, arrays)).differences)]
    known = [pair for pair in found if pair.known]
    labels = len({name for pair in known for name in (pair.label, pair.reference)})
    shared, level = shared_square(arrays, known), level_of(reading)
    spreads = [moderated(spread_of(pair.differences), shared, labels) for pair in known]
    p_values = [p_value(pair.mean, spread) for pair, spread in zip(known, spreads, strict=True)]
    counts = counts_of(len(known), labels)
    adjusted = holm(p_values, counts)
    rejected, ranks = sum(p < level for p in adjusted), np.argsort(np.argsort(p_values, kind="stable"))
    tests = {
        pair[:2]: Judged(
            pair, spread, p, min(1.0, corrected * LEVEL / level), level / counts[min(rank, rejected)], level
        )
        for pair, spread, p, corrected, rank in zip(known, spreads, p_values, adjusted, ranks, strict=True)
    }
    return [tests.get(pair[:2], pair) for pair in found]


def pair_of(label: str, reference: str, arrays: Arrays) -> Pair:
    """Return two labels on the seeds that both have."""
    ours, theirs = arrays[label], arrays[reference]
    both = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    base = theirs[both].mean() if both.any() else math.nan
    return Pair(label, reference, (ours - theirs)[both], float(base), int((~both).sum()))


def shared_square(arrays: Arrays, pairs: Sequence[Pair]) -> float:
    """Return the mean square of seeds over all pairs of the labels of these."""
    labels = dict.fromkeys(name for pair in pairs for name in (pair.label, pair.reference))
    every = [pair for two in itertools.combinations(labels, 2) if (pair := pair_of(*two, arrays)).known]
    spreads = [spread_of(pair.differences) for pair in every]
    degrees = sum(spread.degrees[0] for spread in spreads)
    return sum(spread.degrees[0] * spread.squares[0] for spread in spreads) / (degrees or 1)


def arrays_of(losses: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Return losses as arrays. Raises `ValueError` for other shapes than seeds x images alike, and for losses <= 0."""
    arrays = {label: np.asarray(values, float) for label, values in losses.items()}
    shape = next(iter(arrays.values())).shape if arrays else ()
    for label, values in arrays.items():
        if values.shape != shape or values.ndim != 2 or 0 in shape:
            raise ValueError(f"{label} has losses of shape {values.shape}, not seeds x images alike for all: {shape}")
        if (values <= 0).any():
            raise ValueError(f"{label} has a test loss of {np.nanmin(values):g}, and a loss is above zero")
    return arrays


def verdicts(losses: Mapping[str, ArrayLike], references: Mapping[str, str], unit: str = "image") -> list[Verdict]:
    """Return a verdict on each label of `references`, compared with its reference, corrected for these pairs.

    `losses` holds seeds x images for each label; the same seeds and images in all. A seed that a label lacks is a row
    that is not finite, and is left out of its comparison; a label without a seed in common with its reference has no
    verdict. `unit`: what an image is, in words. Raises `ValueError` for what is no table of losses.
    """
    return [verdict_of(test, unit) for test in judge(arrays_of(losses), references.items())]


def verdict_of(test: Judged | Pair, unit: str = "image", base: float | None = None) -> Verdict:
    """Return a pair's verdict. `base`: the base model's test loss, of which training gains a part."""
    pair = test if isinstance(test, Pair) else test.pair
    mean, percent = pair.mean, 100 / pair.base
    seeds, images = pair.differences.shape
    gain = 0 if base is None else base - pair.base
    found = Verdict(
        label=pair.label, reference=pair.reference, seeds=seeds, images=images, conclusion="cannot tell", sentence="",
        difference=mean, relative=percent * mean, interval=None, rerun=rerun(percent * pair.differences.mean(1)),
        p=None, p_holm=None, detectable=None, expected=None, of_gain=100 * mean / gain if gain > 0 else None,
    )  # fmt: skip
    if isinstance(test, Judged):
        half = float(half_width(test.spread, test.reading_level))
        found["interval"] = percent * (mean - half), percent * (mean + half)
        found["p"], found["p_holm"] = test.p, test.corrected
        found["conclusion"] = "not shown" if not test.significant else "better" if mean < 0 else "worse"
        if seeds > 2:  # of two, what is stated would vary by a factor of ten
            found["detectable"] = percent * detectable(test.spread, test.level)
        if test.significant:
            found["expected"] = percent * expected(mean, test.spread, test.level)
    found["sentence"] = sentence_of(found, pair, unit)
    return found


def sentence_of(verdict: Verdict, pair: Pair, unit: str) -> str:
    """Return the verdict as a sentence."""
    label, reference, relative = verdict["label"], verdict["reference"], verdict["relative"]
    towards = "lower" if relative < 0 else "higher"
    if verdict["interval"] is None or verdict["p"] is None:
        few = "one seed" if verdict["seeds"] == 1 else f"one test {unit}"
        (size,) = percents(relative)
        sentence = f"{few} cannot tell {label} from {reference}: test loss {size}% {towards}, which may be seed noise"
    elif not pair.differences.any():
        sentence = f"{label} and {reference} have the same test losses"
    elif verdict["expected"] is None:
        among = " after correction for all comparisons and readings" if verdict["p"] < LEVEL else ""
        sentence = f"no significant difference between {label} and {reference}{among} ({mde_of(verdict)})"
    else:
        size, least, most = percents(relative, *sorted(map(abs, verdict["interval"])))
        (further,), gain = percents(verdict["expected"]), verdict["of_gain"]
        part = f", {percents(gain)[0]}% of what training gains" if gain is not None else ""
        sentence = (
            f"{label} is {verdict['conclusion']} than {reference}: test loss {size}% {towards} "
            f"(95% interval {least} to {most}%){part}; expect about {further}%"
        )
    if pair.missing:
        missing = pair.missing
        sentence += f"; {missing} of {missing + verdict['seeds']} seeds {is_or_are(missing)} missing"
    return sentence


def mde_of(verdict: Verdict) -> str:
    """Return the minimum detectable effect in words."""
    if verdict["detectable"] is None:
        return "minimum detectable effect not known with two seeds"
    return f"minimum detectable effect {percents(verdict['detectable'])[0]}%"


def ranking_of(tests: Iterable[Judged | Pair], labels: Iterable[str]) -> Ranking | None:
    """Return which labels cannot be told from the best one, and by how much the others are worse.

    A label is worse if it is significantly worse than any other one, by the tests of all pairs. None where nothing is
    tested.
    """
    known = [test for test in tests if isinstance(test, Judged)]
    behind: dict[str, list[Judged]] = {}
    for test in known:
        if test.significant:
            behind.setdefault(test.pair.label if test.pair.mean > 0 else test.pair.reference, []).append(test)
    compared = {name for test in known for name in test.pair[:2]}
    best = [label for label in labels if label in compared and label not in behind]
    if not best:
        return None
    worse = [
        worse_of(label, min(found, key=lambda each: order_of(label, each, best))) for label, found in behind.items()
    ]
    worse.sort(key=lambda each: each["relative"])
    return Ranking(best=best, worse=worse, sentence=ranking_in_words(best, worse))


def order_of(label: str, judged: Judged, best: Sequence[str]) -> tuple[bool, bool, float]:
    """Return what sorts the pairs in which a label is worse: first by one of the best, by its reference, the surest."""
    pair = judged.pair
    other = pair.reference if label == pair.label else pair.label
    return other not in best, label != pair.label, judged.p


def worse_of(label: str, judged: Judged) -> Worse:
    """Return by how much a label is worse than the other one of a pair, in percent of that one's loss."""
    pair, half = judged.pair, float(half_width(judged.spread, judged.reading_level))
    other, base = (pair.reference, pair.base) if label == pair.label else (pair.label, pair.base + pair.mean)
    size, least, most = (100 / base * (abs(pair.mean) + end) for end in (0, -half, half))
    return Worse(label=label, reference=other, relative=size, interval=(least, most))


def ranking_in_words(best: Sequence[str], worse: Sequence[Worse]) -> str:
    """Return the ranking as a sentence: best: lora, reslora (cannot be told apart); loha is worse than lora by ..."""
    sentence = f"best: {', '.join(best)}" + " (cannot be told apart)" * (len(best) > 1)
    reference = None
    for each in worse:
        is_worse = f"; {each['label']} is worse than {each['reference']}"
        least, most = percents(*each["interval"])
        sentence += (f", {each['label']}" if each["reference"] == reference else is_worse) + f" by {least} to {most}%"
        reference = each["reference"]
    return sentence


def percents(*values: float) -> list[str]:
    """Return sizes with so many places, one to four, that the smallest of them still says something."""
    smallest = min((abs(value) for value in values if value), default=1)
    places = min(4, max(1, -math.floor(math.log10(smallest))))
    return [f"{abs(value):.{places}f}" for value in values]


# -- from the record ---------------------------------------------------------------------------------------------------


def compare(
    arms: Iterable[Arm],
    chosen: Mapping[str, Choice],
    unit: str = "image",
    reading: int = 1,
    base: TestLosses | None = None,
) -> tuple[list[Verdict], Ranking | None]:
    """Return a verdict on each label and which ones are best, from the test losses of arms at the chosen rates.

    The reference is LoRA: of the same rank where there are several, which are compared with the first of them. Without
    LoRA nothing is compared. `reading`: how often the test split was read. `base`: losses of the base model. Raises
    `ValueError` if arms were measured on different images.
    """
    judged = [arm for arm in arms if arm["test"] and is_chosen(arm, chosen)]
    ranks = {arm["label"]: arm["rank"] for arm in judged}
    lora = list(dict.fromkeys(arm["label"] for arm in judged if arm["method"] == REFERENCE))
    if not lora:
        return [], None
    same_rank = {label: [each for each in lora if each != label and ranks[each] == ranks[label]] for label in ranks}
    references = {label: (same_rank[label] + lora)[0] for label in ranks if label != lora[0]}
    others = [(b, a) for a, b in itertools.combinations(ranks, 2) if b != references.get(a) and a != references.get(b)]
    found = judge(arrays_of(tested(judged, chosen)), [*references.items(), *others], reading)
    pairs = [(each, each.pair if isinstance(each, Judged) else each) for each in found]
    said = [
        verdict_of(each, unit, mean_of(base)) for each, pair in pairs if references.get(pair.label) == pair.reference
    ]
    return said, ranking_of(found, ranks)


def mean_of(test: TestLosses | None) -> float | None:
    """Return the mean test loss; None where there is none, or one that is not finite."""
    losses = test["losses"] if test else []
    return math.fsum(losses) / len(losses) if losses and None not in losses else None  # type: ignore[arg-type]


def tested(arms: Iterable[Arm], chosen: Mapping[str, Choice]) -> dict[str, np.ndarray]:
    """Judged losses of each label at its chosen rate, seeds x images; NaN where a label lacks a seed that another has.

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


def choose(arms: Iterable[Arm], seeds: Iterable[int] | None = None) -> dict[str, Choice]:
    """Return each label's rate and checkpoint: those whose loss on the select images is lowest, over seeds together.

    Of the arms that have ended, with these `seeds`, or with all; of other seeds it only counts whether a rate failed.
    A rate that fewer seeds ended with than with another is left out. Nothing is chosen where a seed failed or its loss
    is not finite, and a label of which nothing is left has no choice.
    """
    losses: dict[str, dict[float, list[Mapping[str, float | None]]]] = {}
    failed = set()
    for arm in arms:
        by_rate = losses.setdefault(arm["label"], {})
        if arm["status"] == "failed":
            failed.add((arm["label"], arm["learning_rate"]))
        if seeds is None or arm["seed"] in seeds:
            found = by_rate.setdefault(arm["learning_rate"], [])
            if arm["status"] in ("finished", "failed"):
                found.append(arm["select_by_step"])
    for label, rate in failed:
        if rate in losses[label]:
            losses[label][rate] = [{}] * len(losses[label][rate])
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
