"""Test whether methods differ significantly for new seeds and new images, with correction for multiple comparisons.

The data is d[s, u], a method's loss minus another's, for seed s and test unit u: a test image, or the mean of a group
of images that resemble each other. A seed determines initialization, order and noise, and is the same for both methods.
Seeds and units are crossed random effects. A lower loss is better.
benchmarks/experiment_statistics.py simulates the error rates of these tests.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats
from scipy.optimize import brentq

LEVEL = 0.05
"""Maximum probability of any false positive, however often an experiment is extended (family-wise error rate)."""
POWER = 0.8
SIMULATED = 2000
"""Number of simulated experiments to compute a power."""
RANKED = range(5, 31)
"""Numbers of seeds or units that are also tested by ranks: fewer have few orders; the mean of more is nearly normal."""
LEAST_UNITS = 10
"""Least number of images in which groups are looked for."""
LEAST_P = 1e-12
"""Smallest p value that is reported."""


def level_of(reading: int) -> float:
    """Return the significance level of the k-th evaluation on the test split: LEVEL x 6 / (pi k)^2.

    If seeds are added until a difference is significant, every evaluation is one more opportunity for a false positive.
    So each evaluation spends a part of LEVEL, and the sum over any number of evaluations is at most LEVEL.
    """
    return LEVEL * 6 / (math.pi * reading) ** 2


# -- two methods -------------------------------------------------------------------------------------------------------


def error_of(squares: Iterable[np.ndarray], number: int) -> np.ndarray:
    """Return the standard error of a mean of `number` differences from mean squares of shape (3, ...).

    The variance of the mean is max(MS_s + MS_u - MS_e, MS_s, MS_u) / (S U).
    """
    seeds, units, rest = squares
    return np.sqrt(np.maximum(seeds + units - rest, np.maximum(seeds, units)) / number)


def degrees_of(seeds: int, units: int) -> np.ndarray:
    """Return the degrees of freedom of the mean squares of seeds, units and residuals."""
    return np.array([seeds - 1, units - 1, (seeds - 1) * (units - 1)], float)


class Effects(NamedTuple):
    """What seeds, units and both together add to the mean difference, with any batch dimensions of experiments.

    Each pair of methods has its own. Shrinking variances toward the mean of all pairs, as limma does for genes, has too
    many false positives if one method is noisier, also with prior degrees of freedom that are estimated from the data.
    """

    mean: np.ndarray
    """Mean difference, of shape (...)."""
    seeds: np.ndarray
    """Effects of the seeds, of shape (..., seeds), with a mean of zero."""
    units: np.ndarray
    """Effects of the units, of shape (..., units), with a mean of zero."""
    rest: np.ndarray
    """Mean square of the residuals, of shape (...)."""

    @property
    def degrees(self) -> np.ndarray:
        """Degrees of freedom of the mean squares of seeds, units and residuals."""
        return degrees_of(*self.size)

    @property
    def squares(self) -> np.ndarray:
        """Mean squares of seeds, units and residuals in a two-way analysis of variance, of shape (3, ...)."""
        seeds, units = self.size
        return np.stack([units * self.seeds.var(-1, ddof=1), seeds * self.units.var(-1, ddof=1), self.rest])

    @property
    def size(self) -> tuple[int, int]:
        """Number of seeds and of units."""
        return self.seeds.shape[-1], self.units.shape[-1]

    @property
    def number(self) -> int:
        """Number of differences: seeds times units."""
        return math.prod(self.size)

    def half_width(self, level: float) -> np.ndarray:
        """Return half the width of the mean difference's confidence interval, before the correction for skewness.

        Each mean square is multiplied by the square of Student's t with its degrees of freedom (Banerjee, 1961). A
        single t with Satterthwaite's degrees of freedom has too many false positives at the corrected levels.
        """
        students = special.stdtrit(self.degrees, level / 2)
        return error_of([t**2 * square for t, square in zip(students, self.squares, strict=True)], self.number)

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the confidence interval of the mean difference with a coverage of at least 1 - level.

        If the units' effects are skewed, the end on the side of the long tail is further away, by the correction of
        Johnson (1978) for the skewness of a mean; the other end is not moved.
        """
        number, variance = self.units.shape[-1], self.units.var(-1, ddof=1)
        third = (self.units**3).sum(-1) * number / max(1, (number - 1) * (number - 2))
        skewness = np.divide(third, 6 * number * variance, out=np.zeros_like(third), where=variance > 0)
        tail = skewness * (1 + 2 * special.stdtrit(number - 1, level / 2) ** 2)
        half = self.half_width(level)
        return self.mean - half + np.minimum(0, tail), self.mean + half + np.maximum(0, tail)


def effects_of(differences: np.ndarray) -> Effects:
    """Return the effects in differences of shape (..., seeds, units), with at least two seeds and two units."""
    mean = differences.mean((-2, -1), keepdims=True)
    seeds, units = differences.mean(-1, keepdims=True) - mean, differences.mean(-2, keepdims=True) - mean
    rest = np.square(differences - mean - seeds - units).sum((-2, -1))
    found = Effects(mean[..., 0, 0], seeds[..., 0], units[..., 0, :], rest)
    return found._replace(rest=rest / found.degrees[2])


def p_value(effects: Effects) -> float:
    """Return the p value of one mean difference: the level at which its interval reaches zero; at least `LEAST_P`."""

    def beyond(log_level: float) -> float:
        """Return how far zero is outside the interval at level exp(`log_level`)."""
        low, high = effects.interval(math.exp(log_level))
        return float(max(low, -high))

    least = math.log(LEAST_P)
    if beyond(least) >= 0:
        return 1.0 if effects.mean == 0 else LEAST_P
    return math.exp(brentq(beyond, least, 0)) if beyond(0) > 0 else 1.0


@functools.cache
def allowed(number: int, level: float) -> int:
    """Return the largest rank sum of the other sign with which Wilcoxon's signed-rank test is significant.

    The result is 0 if no rank sum is significant: values that all have the same sign always pass.
    """
    orders = np.ones(1)  # how many orders of signs have each rank sum
    for rank in range(1, number + 1):
        orders = np.convolve(orders, [1.0, *[0.0] * (rank - 1), 1.0])
    return max(0, int((np.cumsum(orders) / 2**number <= level / 2).sum()) - 1)


def rank_interval(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the interval of values of shape (..., number) without zero if signed ranks are significant.

    The ends are means of two values each (Hodges and Lehmann, 1963). Numbers that are not `RANKED` have no interval.
    """
    number = values.shape[-1]
    if number not in RANKED:
        return np.full(values.shape[:-1], math.inf), np.full(values.shape[:-1], -math.inf)
    one, other = np.triu_indices(number)
    means, place = np.sort((values[..., one] + values[..., other]) / 2), allowed(number, level)
    return means[..., place], means[..., -1 - place]


def detectable(
    squares: np.ndarray,
    size: tuple[int, int],
    level: float,
    reading_level: float,
    planned: tuple[int, int] | None = None,
) -> tuple[float, float, float]:
    """Return the minimum detectable effect, and the ends of its 80% interval.

    The minimum detectable effect is the true difference that is significant, at `level` and by ranks, with a
    probability of 80%. An experiment only estimates its mean squares, so the true ones are sampled from their fiducial
    distribution. The power is 80% on average over the sampled mean squares; the interval has, for each of them, the
    effect with a power of 80%.

    `squares`: mean squares of an experiment with `size` seeds and units. `planned`: the size of the experiments that
    are to detect the effect, if it is another one.
    """
    seeds, units = planned or size
    random, degrees, known, number = (
        np.random.default_rng(0),
        degrees_of(seeds, units),
        degrees_of(*size),
        seeds * units,
    )

    def effect(true: np.ndarray) -> float:
        """Return the difference with a power of 80% in new experiments with these true mean squares."""
        mean, of_seeds, of_units = (random.standard_normal((SIMULATED, each)) for each in (1, seeds, units))
        mean *= error_of(true, number)[:, None]
        of_seeds = np.sqrt(true[0] / units)[:, None] * (of_seeds - of_seeds.mean(1, keepdims=True))
        of_units = np.sqrt(true[1] / seeds)[:, None] * (of_units - of_units.mean(1, keepdims=True))
        rest = true[2] * random.chisquare(degrees[2], SIMULATED) / degrees[2]
        low, _ = Effects(mean[:, 0], of_seeds, of_units, rest).interval(level)
        ends = [rank_interval(mean + part, reading_level)[0] for part in (of_seeds, of_units)]
        return float(np.quantile(-np.minimum.reduce([low, *ends]), POWER))

    true = squares[:, None] * known[:, None] / random.chisquare(known[:, None], (3, SIMULATED))
    # a mean square of seeds is that of the residuals plus their variance times the number of units, and vice versa
    growth = np.array([units / size[1], seeds / size[0], 1])[:, None]
    true += np.maximum(0, true - true[2]) * (growth - 1)
    about = effect(true)
    some, students = true[:, :300, None], special.stdtrit(degrees, level / 2)[:, None, None]
    shares = random.chisquare(degrees[:, None, None], (3, 1, 400)) / degrees[:, None, None]
    needed = error_of(students**2 * some * shares, number)  # ranks hardly matter here
    needed += error_of(some, number) * random.standard_normal(400)
    least, most = np.quantile(np.quantile(needed, POWER, axis=1), (0.1, 0.9))
    return about, float(least), float(most)


def follow(differences: np.ndarray) -> float:
    """Return the p value of a positive correlation between units that follow one another; 1 if it is not defined."""
    means = np.nanmean(differences, 0)
    if len(means) < LEAST_UNITS or not means.std() > 0:
        return 1.0
    return float(stats.spearmanr(means[1:], means[:-1], alternative="greater").pvalue)


def expected(effects: Effects, level: float) -> float:
    """Return the expected difference in new experiments after a significant result.

    The expected difference is smaller than the observed difference, because only large differences are significant
    (winner's curse). The expected difference is the mean of the true difference, given the observed difference, and
    given that the observed difference exceeds the half width at `level`.
    """
    size, error = abs(float(effects.mean)), float(error_of(effects.squares, effects.number))
    if error == 0:
        return float(effects.mean)
    true = np.linspace(0, size + 4 * error, 400)
    # Logarithms, because both parts of a weight may be too small for a float.
    claimed = special.log_ndtr((true - float(effects.half_width(level))) / error)
    weights = special.softmax(-np.square((size - true) / error) / 2 - claimed)
    return math.copysign(float(weights @ true), effects.mean)


def rerun(values: ArrayLike, least: float = -math.inf) -> tuple[float, float] | None:
    """Return the 95% prediction interval for one more value, by Student's t; None for fewer than two values.

    `values` has one value for each seed, on the same images: a difference, or a loss (with `least` = 0, the interval's
    lower bound). The interval is wider than the confidence interval of the mean, because it includes the variation of a
    single seed.
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        return None
    half = stats.t.isf(LEVEL / 2, len(found) - 1) * found.std(ddof=1) * math.sqrt(1 + 1 / len(found))
    return max(float(found.mean() - half), least), float(found.mean() + half)


# -- all methods -------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A method and the reference that it is compared with, on the seeds that both have, and its test result."""

    label: str
    reference: str
    differences: np.ndarray
    """The method's losses minus the reference's, of shape (seeds, units)."""
    base: float
    """Mean loss of the reference."""
    has: np.ndarray
    """Which of all seeds have finite losses of both methods."""
    reading_level: float
    """Significance level of this evaluation on the test split (`level_of`)."""
    fixed_runs: bool = False
    """Whether only units are random: the comparison is about these very runs, not about their methods with new seeds.
    """
    effects: Effects | None = None
    """None without enough common seeds or units for a test. The next values are then undefined."""
    p: float = 1.0
    corrected: float = 1.0
    """p value corrected for all pairs and all evaluations on the test split."""
    level: float = 0.0
    """Significance level at which Holm's procedure tests this pair."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(self.differences.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the confidence interval of the mean difference at `reading_level`, if it is tested."""
        low, high = self.effects.interval(self.reading_level) if self.effects else (math.nan, math.nan)
        return float(low), float(high)

    @property
    def disagrees(self) -> int | None:
        """0 if the signed ranks of seeds are not significant at `reading_level`, 1 if those of units are not."""
        for axis in (1,) if self.fixed_runs else (0, 1):
            low, high = rank_interval(self.differences.mean(1 - axis), self.reading_level)
            if low <= 0 <= high:
                return axis
        return None

    @property
    def significant(self) -> bool:
        """Whether the difference is significant by Student's t and by ranks: a single seed or unit cannot decide."""
        return self.corrected < LEVEL and self.disagrees is None

    @property
    def farthest(self) -> tuple[int, int]:
        """The places, among all seeds and units, of the seed and the unit that differ most from the others."""
        seed, unit = (int(abs(means - np.median(means)).argmax()) for means in map(self.differences.mean, (1, 0)))
        return int(np.flatnonzero(self.has)[seed]), unit


Arrays = Mapping[str, np.ndarray]
"""Losses of each label, of shape (seeds, units)."""


def judge(
    arrays: Arrays,
    pairs: Iterable[tuple[str, str]],
    reading: int = 1,
    family: int = 0,
    part: float = 1.0,
    least: int = 2,
    fixed_runs: bool = False,
) -> list[Comparison]:
    """Return the test result of each pair, by Holm's (1979) procedure at the level of this evaluation.

    `reading`: number of this evaluation on the test split, from 1. `family`: number of pairs ever compared, if there
    were more. `part`: the fraction of the significance level that these pairs get. `least`: least number of units.
    `fixed_runs`: only units are random, so that one seed is enough: the test is Student's paired t test over the units,
    of the mean over the seeds. A pair without a common seed is left out.
    """
    found = []
    for label, reference in pairs:
        differences = arrays[label] - arrays[reference]
        has = np.isfinite(differences).all(1)
        if has.any():
            base = float(arrays[reference][has].mean())
            found.append(Comparison(label, reference, differences[has], base, has, level_of(reading), fixed_runs))
    seeds = 1 if fixed_runs else 2
    tested = [each for each in found if len(each.differences) >= seeds and each.differences.shape[1] >= least]
    for each in tested:
        # If two methods have equal losses, the mean squares of seeds and residuals are zero, and only that of the units
        # remains.
        rows = np.stack([each.differences.mean(0)] * 2) if fixed_runs else each.differences
        each.effects = effects_of(rows)
        each.p = p_value(each.effects)
    number, level, largest = max(family, len(tested)), part * level_of(reading), 0.0
    for rank, each in enumerate(sorted(tested, key=lambda each: each.p)):
        if largest < level:  # every pair with a smaller p value is significant
            each_level = level / (number - rank)
        largest = max(largest, min(1.0, (number - rank) * each.p))
        each.level, each.corrected = each_level, min(1.0, largest * LEVEL / level)
    return found
