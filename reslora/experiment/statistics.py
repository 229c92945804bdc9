"""Test whether methods differ significantly for new seeds and new images, with correction for multiple comparisons.

The data is d[s, u], a method's loss minus another's, for seed s and test unit u: a test image, or the mean of a group
of images that resemble each other. A seed determines initialization, order and noise, and is the same for both methods.
Seeds and units are crossed random effects. A lower loss is better.
An arm is one training run: a method (with its values of the options that vary) with a learning rate and a seed. A
verdict is about methods at their chosen learning rates, which it names.
benchmarks/experiment_statistics.py simulates the error rates of these tests.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats
from scipy.optimize import brentq

LEVEL = 0.05
"""Maximum probability of any false positive, however often an experiment is extended (family-wise error rate)."""
POWER = 0.8
SIMULATED = 300, 400
"""Numbers of simulated true spreads, and of experiments with each of them, to compute a power."""
RANKED = 5
"""Least number of seeds with which a second test is made, by ranks: fewer seeds have too few orders."""
LEAST_P = 1e-12
"""Smallest p value that is reported."""


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
    """Mean squares of the differences in a two-way analysis of variance, by seed and by unit, and their skewness."""

    squares: np.ndarray
    """Mean squares of seeds, units and residuals, of shape (3, ...), with any batch dimensions of experiments."""
    degrees: np.ndarray
    """Degrees of freedom of the mean squares, of shape (3,)."""
    number: int
    """Number of differences: seeds times units."""
    skew: np.ndarray | float = 0.0
    """Third moment of the units' means divided by their variance and by six times their number, of shape (...)."""

    @property
    def error(self) -> np.ndarray:
        """Standard error of the mean difference, of shape (...)."""
        seeds, units, rest = self.squares
        return np.sqrt(np.maximum(seeds + units - rest, np.maximum(seeds, units)) / self.number)


def spread_of(differences: np.ndarray) -> Spread:
    """Return the spread of differences of shape (..., seeds, units), with at least two seeds and two units.

    Each pair of methods has its own spread. Shrinking it toward the mean of all pairs, as limma does for genes, has too
    many false positives if one method is noisier, also with prior degrees of freedom that are estimated from the data.
    """
    seeds, units = differences.shape[-2:]
    mean = differences.mean((-2, -1), keepdims=True)
    by_seed = differences.mean(-1, keepdims=True) - mean
    by_unit = differences.mean(-2, keepdims=True) - mean
    parts = by_seed, by_unit, differences - mean - by_seed - by_unit
    degrees = np.array([seeds - 1, units - 1, (seeds - 1) * (units - 1)], float)
    sums = [n * np.square(part).sum((-2, -1)) for n, part in zip((units, seeds, 1), parts, strict=True)]
    squares = np.stack([total / df for total, df in zip(sums, degrees, strict=True)])
    third = (by_unit**3).sum((-2, -1)) * units / max(1, (units - 1) * (units - 2))
    variance = squares[1] / seeds
    skew = np.divide(third, 6 * units * variance, out=np.zeros_like(third), where=variance > 0)
    return Spread(squares, degrees, seeds * units, skew)


def half_width(spread: Spread, level: float) -> np.ndarray:
    """Return half the width of the confidence interval of a mean difference without skewness, of shape (...).

    Each mean square is multiplied by the square of Student's t with its degrees of freedom (Banerjee, 1961). The
    products are combined as in the variance of the mean, max(MS_s + MS_u - MS_e, MS_s, MS_u) / (S U). A single t with
    Satterthwaite's degrees of freedom has too many false positives with few seeds at the corrected levels.
    """
    students = np.square(special.stdtrit(spread.degrees, level / 2))
    products = [t * square for t, square in zip(students, spread.squares, strict=True)]
    return spread._replace(squares=np.stack(products)).error


def interval_of(mean: np.ndarray | float, spread: Spread, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the confidence interval of a mean difference with a coverage of at least 1 - level.

    If the differences of units are skewed, the end on the side of the long tail is further away, by the correction of
    Johnson (1978) for the skewness of a mean; the other end is not moved.
    """
    half = half_width(spread, level)
    tail = spread.skew * (1 + 2 * special.stdtrit(spread.degrees[1], level / 2) ** 2)
    return mean - half + np.minimum(0, tail), mean + half + np.maximum(0, tail)


def p_value(mean: float, spread: Spread) -> float:
    """Return the p value of a mean difference: the level at which its interval reaches zero; at least `LEAST_P`."""
    if mean == 0:
        return 1.0

    def excess_width(log_level: float) -> float:
        """Return how far the interval at level exp(`log_level`) exceeds zero."""
        low, high = interval_of(mean, spread, math.exp(log_level))
        return float(-low if mean > 0 else high)

    least = math.log(LEAST_P)
    if excess_width(least) <= 0:
        return LEAST_P
    return math.exp(brentq(excess_width, least, 0)) if excess_width(0) < 0 else 1.0


def p_of_ranks(differences: np.ndarray) -> np.ndarray:
    """Return the p values of Wilcoxon's signed-rank test over the means of seeds, of shape (...); 0 for the smallest.

    It is the second test with `RANKED` seeds or more: a single seed that went wrong cannot make a difference
    significant. With few seeds even the smallest p value is large, so it does not count.
    """
    means, seeds = differences.mean(-1), differences.shape[-2]
    if seeds < RANKED:
        return np.zeros(means.shape[:-1])
    p = stats.wilcoxon(means + (means == 0) * np.finfo(float).tiny, axis=-1).pvalue
    return np.where(p > 1.001 * 2.0 ** (1 - seeds), p, 0.0)


def detectable(spread: Spread, level: float) -> tuple[float, float, float]:
    """Return the minimum detectable effect, and the ends of its 80% interval.

    It is the true difference that is significant with a probability of 80%. An experiment only estimates its mean
    squares, so the true ones are sampled from their fiducial distribution. The power is 80% on average over them; the
    interval has the effects with a power of 80% for each of them.
    """
    degrees, random = spread.degrees, np.random.default_rng(0)
    shares = [random.chisquare(degrees[:, None], (3, number)) / degrees[:, None] for number in SIMULATED]
    true = spread.squares[:, None] / shares[0]
    needed = half_width(spread._replace(squares=true[..., None] * shares[1][:, None]), level)
    error = spread._replace(squares=true).error[:, None]
    effects = needed + error * random.standard_normal(needed.shape)  # as large as chance requires
    least, most = np.quantile(np.quantile(effects, POWER, axis=1), (0.1, 0.9))
    return float(np.quantile(effects, POWER)), float(least), float(most)


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


def holm(p_values: Sequence[float], number: int) -> list[float]:
    """Return Holm's (1979) adjusted p values, in the order of `p_values`, in a family of `number` comparisons."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (number - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


class Pair(NamedTuple):
    """A method and the reference that it is compared with, restricted to the seeds that both have."""

    label: str
    reference: str
    differences: np.ndarray
    """The method's losses minus the reference's, of shape (seeds, units)."""
    base: float
    """Mean loss of the reference."""
    has: np.ndarray
    """Which of all seeds have finite losses of both."""

    @property
    def mean(self) -> float:
        """Mean difference."""
        return float(self.differences.mean())

    @property
    def outlier(self) -> tuple[int, int]:
        """The places, among all seeds and units, of the seed and the unit that differ most from the others."""
        by_seed, by_unit = self.differences.mean(1), self.differences.mean(0)
        far = (int(abs(means - np.median(means)).argmax()) for means in (by_seed, by_unit))
        return int(np.flatnonzero(self.has)[next(far)]), next(far)


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
    decides: str
    """`seed` or `unit` if one of them decides: the test without skewness and ranks is significant, this one is not."""

    @property
    def significant(self) -> bool:
        """Whether the difference is significant."""
        return self.corrected < LEVEL


Arrays = Mapping[str, np.ndarray]
"""Losses of each label, of shape (seeds, units)."""


Tests = Sequence[tuple[Pair, Judged | None]]
"""Pairs with their test results; None for a pair without enough common seeds or units."""


def judge(
    arrays: Arrays,
    pairs: Iterable[tuple[str, str]],
    reading: int = 1,
    family: int = 0,
    part: float = 1.0,
    least: int = 2,
) -> Tests:
    """Return the test result of each pair, corrected for all pairs and for repeated evaluations on the test split.

    `reading`: number of this evaluation, from 1. `family`: number of pairs ever compared, if there were more. `part`:
    the part of the significance level that these pairs have. `least`: least number of units. A pair without a common
    seed is left out.
    """
    found = [pair for each in pairs if len((pair := pair_of(*each, arrays)).differences)]
    known = [pair for pair in found if len(pair.differences) > 1 and pair.differences.shape[1] >= least]
    spreads, level = [spread_of(pair.differences) for pair in known], part * level_of(reading)
    by_interval = [p_value(pair.mean, spread) for pair, spread in zip(known, spreads, strict=True)]
    by_ranks = [float(p_of_ranks(pair.differences)) for pair in known]
    p_values = list(map(max, by_interval, by_ranks))
    number = max(family, len(known))
    adjusted = holm(p_values, number)
    rejected, tests = sum(p < level for p in adjusted), {}
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        pair, spread, p = known[place], spreads[place], p_values[place]
        own = level / (number - min(rank, rejected))
        alone = p_value(pair.mean, spread._replace(skew=0.0))
        decides = "" if p < own or alone >= own else "seed" if by_ranks[place] > by_interval[place] else "unit"
        corrected = min(1.0, adjusted[place] * LEVEL / level)
        tests[pair[:2]] = Judged(pair, spread, p, corrected, own, level_of(reading), decides)
    return [(pair, tests.get(pair[:2])) for pair in found]


def pair_of(label: str, reference: str, arrays: Arrays) -> Pair:
    """Return the differences of two methods on the seeds that both have."""
    ours, theirs = arrays[label], arrays[reference]
    both = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
    base = float(theirs[both].mean()) if both.any() else math.nan
    return Pair(label, reference, (ours - theirs)[both], base, np.asarray(both))
