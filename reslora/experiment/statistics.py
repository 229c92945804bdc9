"""Test whether methods differ significantly for new seeds and new images, with correction for multiple comparisons.

The data is d[s, i], a method's loss minus another's, for seed s and test image i. A seed determines initialization,
order and noise, and is the same for both methods. Seeds and images are crossed random effects. A lower loss is better.
An arm is one training run: a method (with its values of the options that vary) with a learning rate and a seed.
benchmarks/experiment_statistics.py simulates the error rates of these tests.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.optimize import brentq

from ..formatting import is_or_are
from .record import ENDED_AS, Arm, Choice, Ranking, TestLosses, Verdict, Worse

REFERENCE = "lora"
"""The reference method, with which all others are compared."""
LEVEL = 0.05
"""Maximum probability of any false positive, however often an experiment is extended (family-wise error rate)."""
PRIOR = 2.5
"""Maximum degrees of freedom that the variance pooled over all methods adds to the variance of one pair."""
POWER = 0.8
SIMULATED = 4000
"""Number of simulated experiments to compute a power."""
LEAST_P = 1e-12
"""Smallest p value that is reported."""
LARGEST_STEP = 10
"""Largest ratio from the best learning rate to the next one to try, if the adjacent one has no finite loss."""


def level_of(reading: int) -> float:
    """Return the significance level of the k-th evaluation on the test split: LEVEL x 6 / (pi k)^2.

    If seeds are added until a difference is significant, every evaluation is one more opportunity for a false positive.
    So each evaluation spends a part of LEVEL, and the sum over any number of evaluations is at most LEVEL.
    """
    return LEVEL * 6 / (math.pi * reading) ** 2


def coverage_in_words(level: float) -> str:
    """Return the coverage of intervals at a significance level: 97% at the first evaluation, 99.2% at the second."""
    percent = 100 * level
    return f"{100 - percent:.{max(0, -math.floor(math.log10(percent)))}f}%"


# -- two methods -------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Mean squares of the differences in a two-way analysis of variance, by seed and by image."""

    squares: np.ndarray
    """Mean squares of seeds, images and residuals, of shape (3, ...), with any batch dimensions of experiments."""
    degrees: np.ndarray
    """Degrees of freedom of the mean squares, of shape (3,)."""
    number: int
    """Number of differences: seeds times images."""

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean difference, of shape (...)."""
        seeds, images, rest = self.squares
        return np.sqrt(np.maximum(seeds + images - rest, np.maximum(seeds, images)) / self.number)


def spread_of(differences: np.ndarray) -> Spread:
    """Return the mean squares of differences of shape (..., seeds, images), with at least two seeds and two images."""
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
    """Return a pair's spread with its mean square of seeds shrunk toward `shared`, the mean over all pairs of methods.

    A few seeds give a poor estimate of the variance between seeds, but this variance is similar for all methods. For
    the same reason limma shrinks the variances of genes (Smyth, 2004). The mean over all pairs has (methods - 1) x
    (seeds - 1) degrees of freedom. At most PRIOR degrees of freedom are added: with more, a method whose variation is
    three times that of the others would have too many false positives. `shared` is a number or has the shape (...) of a
    mean square.
    """
    own = spread.degrees[0]
    more = min(PRIOR, (labels - 2) * own)
    seeds = (own * spread.squares[0] + more * shared) / (own + more)
    degrees = np.array([own + more, *spread.degrees[1:]])
    return spread._replace(squares=np.stack([seeds, *spread.squares[1:]]), degrees=degrees)


def half_width(spread: Spread, level: float) -> np.ndarray:
    """Return half the width of the confidence interval of a mean difference with coverage 1 - level, of shape (...).

    Each mean square is multiplied by the square of Student's t with its degrees of freedom (Banerjee, 1961). The
    products are combined as in the variance of the mean, max(MS_s + MS_i - MS_e, MS_s, MS_i) / (S I). A single t with
    Satterthwaite's degrees of freedom has too many false positives with few seeds at the corrected levels.
    """
    students = np.square(special.stdtrit(spread.degrees, level / 2))
    products = [t * square for t, square in zip(students, spread.squares, strict=True)]
    return spread._replace(squares=np.stack(products)).error


def p_value(difference: float, spread: Spread) -> float:
    """Return the p value of a mean difference: the level at which its interval reaches zero; at least `LEAST_P`."""
    if difference == 0:
        return 1.0

    def excess_width(log_level: float) -> float:
        """Return how far the half width of the interval at level exp(`log_level`) exceeds |`difference`|."""
        return float(half_width(spread, math.exp(log_level))) - abs(difference)

    least = math.log(LEAST_P)
    return LEAST_P if excess_width(least) <= 0 else math.exp(brentq(excess_width, least, 0))


def detectable(spread: Spread, level: float) -> float:
    """Return the minimum detectable effect: the true difference that is significant with a probability of 80%.

    The true mean squares are sampled from their fiducial distribution. So the power is 80% on average over experiments,
    although each experiment only estimates its mean squares.
    """
    degrees, random = spread.degrees, np.random.default_rng(0)
    chances, again = random.chisquare(degrees[:, None], (2, 3, SIMULATED)) / degrees[:, None]
    true = spread.squares[:, None] / chances
    error = spread._replace(squares=true).error
    if not error.any():
        return 0.0
    needed = half_width(spread._replace(squares=again * true), level)

    def missing_power(difference: float) -> float:
        """Return `POWER` minus the power of the test at a true difference of `difference`."""
        return POWER - float(special.ndtr((difference - needed) / error).mean())

    return brentq(missing_power, 0, float((needed + 3 * error).max()))


def expected(difference: float, spread: Spread, level: float) -> float:
    """Return the expected difference in new experiments after a significant result.

    It is smaller than the observed difference, because only large differences are significant (winner's curse). It is
    the mean of the true difference, given the observed difference, and given that the observed difference exceeds the
    half width at `level`.
    """
    size, error = abs(difference), float(spread.error)
    if error == 0:
        return difference
    true = np.linspace(0, size + 4 * error, 400)
    # Logarithms, because both parts of a weight may be too small for a float.
    claimed = special.log_ndtr((true - float(half_width(spread, level))) / error)
    logs = -np.square((size - true) / error) / 2 - claimed
    weights = np.exp(logs - logs.max())
    return math.copysign(float((weights * true).sum() / weights.sum()), difference)


def rerun(values: ArrayLike, least: float = -math.inf) -> tuple[float, float] | None:
    """Return the 95% prediction interval for one more value, by Student's t; None for fewer than two values.

    `values` has one value for each seed, on the same images: a difference, or a loss (with `least` = 0, the interval's
    lower bound). The interval is wider than the confidence interval of the mean, because it includes the variation of a
    single seed.
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        return None
    half = -special.stdtrit(len(found) - 1, LEVEL / 2) * found.std(ddof=1) * math.sqrt(1 + 1 / len(found))
    return max(float(found.mean() - half), least), float(found.mean() + half)


# -- all methods -------------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float], counts: Sequence[int] = ()) -> list[float]:
    """Return Holm's (1979) adjusted p values, in the order of `p_values`.

    `counts`: how many hypotheses can be true after 0, 1, 2 ... rejections; by default all that remain.
    """
    counts = counts or range(len(p_values), 0, -1)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for count, number in zip(counts, np.argsort(p_values, kind="stable"), strict=True):
        largest = max(largest, min(1.0, count * p_values[number]))
        adjusted[number] = largest
    return adjusted


@functools.cache
def equal_pairs(labels: int) -> frozenset[int]:
    """Return the possible numbers of pairs that are equal, among this many methods: 0, 1 or 3 of three, but not 2."""
    if not labels:
        return frozenset({0})
    groups = ((math.comb(size, 2), equal_pairs(labels - size)) for size in range(1, labels + 1))
    return frozenset(own + others for own, rest in groups for others in rest)


def counts_of(pairs: int, labels: int) -> list[int]:
    """Return `counts` for `holm` that are valid for all pairs of methods (Shaffer, 1986).

    If a pair is missing, they are the defaults of `holm`.
    """
    if pairs != math.comb(labels, 2):
        return list(range(pairs, 0, -1))
    return [max(count for count in equal_pairs(labels) if count <= left) for left in range(pairs, 0, -1)]


class Pair(NamedTuple):
    """A method and the reference that it is compared with, restricted to the seeds that both have."""

    label: str
    reference: str
    differences: np.ndarray
    """The method's losses minus the reference's, of shape (seeds, images)."""
    base: float
    """Mean loss of the reference."""
    missing: int
    """Number of seeds without finite losses of both."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(self.differences.mean())

    @property
    def known(self) -> bool:
        """Whether there are enough seeds and images, two each, to estimate a spread."""
        return min(self.differences.shape) > 1


class Judged(NamedTuple):
    """The test result of a pair."""

    pair: Pair
    spread: Spread
    p: float
    corrected: float
    """p value corrected for all pairs and all evaluations on the test split; significant below LEVEL."""
    level: float
    """Significance level at which Holm's procedure tests this pair."""
    reading_level: float
    """Significance level of this evaluation on the test split (`level_of`)."""

    @property
    def significant(self) -> bool:
        """Whether the difference is significant."""
        return self.corrected < LEVEL


Arrays = Mapping[str, np.ndarray]
"""Losses of each label, of shape (seeds, images)."""


Tests = Sequence[tuple[Pair, Judged | None]]
"""Pairs with their test results; None for a pair with a single common seed or image."""


def judge(arrays: Arrays, pairs: Iterable[tuple[str, str]], reading: int = 1) -> Tests:
    """Return the test result of each pair, corrected for all pairs and for repeated evaluations on the test split.

    `reading`: number of this evaluation, from 1. A pair without a common seed is left out.
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
    return [(pair, tests.get(pair[:2])) for pair in found]


def pair_of(label: str, reference: str, arrays: Arrays) -> Pair:
    """Return the differences of two methods on the seeds that both have."""
    ours, theirs = arrays[label], arrays[reference]
    both = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    base = theirs[both].mean() if both.any() else math.nan
    return Pair(label, reference, (ours - theirs)[both], float(base), int((~both).sum()))


def shared_square(arrays: Arrays, pairs: Sequence[Pair]) -> float:
    """Return the mean square of seeds, pooled over all pairs of the methods that occur in `pairs`."""
    labels = dict.fromkeys(name for pair in pairs for name in (pair.label, pair.reference))
    every = [pair for two in itertools.combinations(labels, 2) if (pair := pair_of(*two, arrays)).known]
    spreads = [spread_of(pair.differences) for pair in every]
    degrees = sum(spread.degrees[0] for spread in spreads)
    return sum(spread.degrees[0] * spread.squares[0] for spread in spreads) / (degrees or 1)


def arrays_of(losses: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Return the losses as arrays of shape (seeds, images).

    Raises `ValueError` if the losses of a method have another number of dimensions, or another shape than those of the
    other methods, and for losses <= 0.
    """
    arrays = {label: np.asarray(values, float) for label, values in losses.items()}
    shape = next(iter(arrays.values())).shape if arrays else ()
    for label, values in arrays.items():
        if values.shape != shape or values.ndim != 2 or 0 in shape:
            raise ValueError(f"{label} has losses of shape {values.shape}, not seeds x images as all others: {shape}")
        if (values <= 0).any():
            raise ValueError(f"{label} has a test loss of {np.nanmin(values):g}, but losses must be above zero")
    return arrays


def verdict_of(pair: Pair, test: Judged | None, unit: str = "image", base: float | None = None) -> Verdict:
    """Return a pair's verdict; the test loss before training, `base`, relates it to the improvement by training."""
    mean, percent = pair.mean, 100 / pair.base
    seeds, images = pair.differences.shape
    gain = 0 if base is None else base - pair.base
    found = Verdict(
        label=pair.label, reference=pair.reference, seeds=seeds, images=images, conclusion="cannot tell", sentence="",
        difference=mean, relative=percent * mean, interval=None, rerun=rerun(percent * pair.differences.mean(1)),
        level=None, p=None, p_holm=None, detectable=None, expected=None,
        of_gain=100 * mean / gain if gain > 0 else None,
    )  # fmt: skip
    if test:
        half = float(half_width(test.spread, test.reading_level))
        found["interval"] = percent * (mean - half), percent * (mean + half)
        found["level"], found["p"], found["p_holm"] = test.reading_level, test.p, test.corrected
        found["conclusion"] = "not shown" if not test.significant else "better" if mean < 0 else "worse"
        if seeds > 2:  # with two seeds the estimate would vary by a factor of ten
            found["detectable"] = percent * detectable(test.spread, test.level)
        if test.significant:
            found["expected"] = percent * expected(mean, test.spread, test.level)
    found["sentence"] = sentence_of(found, pair, unit)
    return found


def sentence_of(verdict: Verdict, pair: Pair, unit: str) -> str:
    """Return the verdict as a sentence."""
    label, reference, relative = verdict["label"], verdict["reference"], verdict["relative"]
    towards = "lower" if relative < 0 else "higher"
    if verdict["interval"] is None or verdict["p"] is None or verdict["level"] is None:
        few = "one seed" if verdict["seeds"] == 1 else f"one test {unit}"
        (size,) = percents(relative)
        sentence = f"{few} cannot tell {label} from {reference}: test loss {size}% {towards}, which may be seed noise"
    elif not pair.differences.any():
        sentence = f"{label} and {reference} have the same test losses"
    elif verdict["expected"] is None:
        among = " after correction for all comparisons and evaluations" if verdict["p"] < LEVEL else ""
        effect = verdict["detectable"]
        mde = "not known with two seeds" if effect is None else f"{percents(effect)[0]}%"
        sentence = f"no significant difference between {label} and {reference}{among} (minimum detectable effect {mde})"
    else:
        size, least, most = percents(relative, *sorted(map(abs, verdict["interval"])))
        (further,), gain = percents(verdict["expected"]), verdict["of_gain"]
        part = f", {percents(gain)[0]}% of what training gains" if gain is not None else ""
        sentence = (
            f"{label} is {verdict['conclusion']} than {reference}: test loss {size}% {towards} "
            f"({coverage_in_words(verdict['level'])} interval {least} to {most}%){part}; expect about {further}%"
        )
    if pair.missing:
        missing = pair.missing
        sentence += f"; {missing} of {missing + verdict['seeds']} seeds {is_or_are(missing)} missing"
    return sentence


def ranking_of(tests: Tests, labels: Iterable[str]) -> Ranking | None:
    """Return the methods that do not differ significantly from the best one, and by how much the others are worse.

    A method is worse if it is significantly worse than the other method of any of its pairs. None if no pair is tested.
    """
    known = [test for _, test in tests if test]
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
    """Return the sort key of a pair in which `label` is worse than the other method.

    Pairs in which the other one is one of the `best` come first, then the pair with the reference, then low p values.
    """
    pair = judged.pair
    other = pair.reference if label == pair.label else pair.label
    return other not in best, label != pair.label, judged.p


def worse_of(label: str, judged: Judged) -> Worse:
    """Return by how much a method is worse than the other method of a pair, in percent of the other method's loss."""
    pair, half = judged.pair, float(half_width(judged.spread, judged.reading_level))
    other, base = (pair.reference, pair.base) if label == pair.label else (pair.label, pair.base + pair.mean)
    size, least, most = (100 / base * (abs(pair.mean) + end) for end in (0, -half, half))
    return Worse(label=label, reference=other, relative=size, interval=(least, most))


def ranking_in_words(best: Sequence[str], worse: Sequence[Worse]) -> str:
    """Return the ranking as a sentence: the best methods, then each other method and by how much it is worse."""
    sentence = f"best: {', '.join(best)}" + " (cannot be told apart)" * (len(best) > 1)
    reference = None
    for each in worse:
        is_worse = f"; {each['label']} is worse than {each['reference']}"
        least, most = percents(*each["interval"])
        sentence += (f", {each['label']}" if each["reference"] == reference else is_worse) + f" by {least} to {most}%"
        reference = each["reference"]
    return sentence


def percents(*values: float) -> list[str]:
    """Format values without their signs, all with the same number of decimal places, from one to four.

    The number is the smallest with which the smallest nonzero value has a nonzero digit, if four are enough.
    """
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
    reference: str = REFERENCE,
) -> tuple[list[Verdict], Ranking | None]:
    """Return the verdict on each label, and the ranking, from the test losses of arms at the chosen learning rates.

    `reference`: a method, or one variant of a method (`arms.Label`). If the reference method has several variants,
    another method is compared with one of them (`partner_of`), and the other variants of the reference method are
    compared with its first one. An average of a method's checkpoints is compared with that method. Without the
    reference nothing is compared. `reading`: number of evaluations on the test split. `base`: losses before training.
    Raises `ValueError` if arms were evaluated on different images.
    """
    judged = [arm for arm in arms if arm["test"] and is_chosen(arm, chosen)]
    kinds = {arm["label"]: kind_of(arm) for arm in judged}
    sources = {arm["label"]: arm["average_of"] for arm in judged if arm.get("average_of") in kinds}
    of_method = dict.fromkeys(arm["label"] for arm in judged if arm["method"] == reference and "average_of" not in arm)
    known = [reference] if reference in kinds else list(of_method)
    if not known:
        return [], None
    references = {label: sources.get(label) or partner_of(label, known, kinds) for label in kinds if label != known[0]}
    others = [(b, a) for a, b in itertools.combinations(kinds, 2) if b != references.get(a) and a != references.get(b)]
    found = judge(arrays_of(tested(judged, chosen)), [*references.items(), *others], reading)
    said = [
        verdict_of(pair, test, unit, mean_of(base))
        for pair, test in found
        if references.get(pair.label) == pair.reference
    ]
    return said, ranking_of(found, kinds)


def kind_of(arm: Arm) -> dict[str, Any]:
    """Return an arm's rank, shortcut and other values that vary, by name, as far as its method uses them."""
    used = {"shortcut": arm["shortcut"]} if arm.get("shortcut") else {}
    return {"rank": arm["rank"], **used, **arm.get("values", {})}


def partner_of(label: str, references: Sequence[str], kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the reference of a method: the first one with equal values of all options that both use.

    If there is none, or if the method is one of the references, it is the first of these. `kinds`: `kind_of` by name.
    """
    own = {} if label in references else kinds[label]
    equal = (each for each in references if all(own[name] == kinds[each][name] for name in own.keys() & kinds[each]))
    return next(equal, references[0])


def mean_of(test: TestLosses | None) -> float | None:
    """Return the mean test loss; None without losses, or if any of them is not finite."""
    losses = test["losses"] if test else []
    return math.fsum(losses) / len(losses) if losses and None not in losses else None  # type: ignore[arg-type]


def tested(arms: Iterable[Arm], chosen: Mapping[str, Choice]) -> dict[str, np.ndarray]:
    """Return the test losses of each method at its chosen learning rate, of shape (seeds, images).

    A seed that only other methods have is a row of NaN, and a non-finite loss is NaN. Raises `ValueError` if arms
    were evaluated on different images.
    """
    tests: dict[str, dict[int, TestLosses]] = {}
    for arm in arms:
        if (test := arm["test"]) and is_chosen(arm, chosen):
            tests.setdefault(arm["label"], {})[arm["seed"]] = test
    all_tests = [test for by_seed in tests.values() for test in by_seed.values()]
    if any(test["images"] != all_tests[0]["images"] for test in all_tests):
        raise ValueError("runs were evaluated on different test images, so they cannot be compared")
    seeds = sorted({seed for by_seed in tests.values() for seed in by_seed})
    found = {}
    for label, by_seed in tests.items():
        rows = [by_seed[seed]["losses"] if seed in by_seed else [None] * len(all_tests[0]["images"]) for seed in seeds]
        found[label] = np.array(rows, float)  # None becomes NaN
    return found


def is_chosen(arm: Arm, chosen: Mapping[str, Choice]) -> bool:
    """Return whether an arm was trained at its method's chosen learning rate."""
    label = arm["label"]
    return label in chosen and arm["learning_rate"] == chosen[label]["learning_rate"]


def choose(arms: Iterable[Arm], seeds: Iterable[int] | None = None) -> dict[str, Choice]:
    """Return each method's learning rate and checkpoint with the lowest mean loss on the selection split over seeds.

    The means are over the ended arms with these `seeds` (default: all). A learning rate is not chosen if an arm with
    any seed failed or was stopped early there, or if fewer seeds have ended there than elsewhere. Checkpoints with a
    non-finite loss are left out. A method without a remaining checkpoint is not in the result.
    """
    losses: dict[str, dict[float, list[Mapping[str, float | None]]]] = {}
    failed = set()
    for arm in arms:
        by_rate = losses.setdefault(arm["label"], {})
        if arm["status"] == "failed":
            failed.add((arm["label"], arm["learning_rate"]))
        if seeds is None or arm["seed"] in seeds:
            found = by_rate.setdefault(arm["learning_rate"], [])
            if arm["status"] in ENDED_AS:
                found.append(arm["select_by_step"] if arm["status"] != "stopped" else {})
    for label, rate in failed:
        if rate in losses[label]:
            losses[label][rate] = [{}] * len(losses[label][rate])
    choices = {label: choice(by_rate) for label, by_rate in losses.items()}
    return {label: found for label, found in choices.items() if found is not None}


def choice(losses: Mapping[float, Sequence[Mapping[str, float | None]]]) -> Choice | None:
    """Return the choice of one method. `losses`: by learning rate, the `select_by_step` of each seed that has ended.

    None if no loss is finite. Learning rates with fewer seeds than others are left out.

    `at_end` and `next` are set if the best learning rate is the lowest or the highest key of `losses`, and an arm at
    the learning rate next to it has ended. `next` continues the series by the ratio of these two. The ratio is at most
    LARGEST_STEP if the other one has no finite loss, because it may be far too high.
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
        found["next"] = float(f"{best * ratio:.3g}")  # as in the names of directories
    return found
