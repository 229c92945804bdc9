"""Verdicts: formulas by hand, and simulated experiments, few of which may report a difference that does not exist."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from reslora.experiment.statistics import (
    LEVEL,
    Spread,
    detectable,
    expected,
    half_width,
    holm,
    interval_of,
    level_of,
    p_of_ranks,
    p_value,
    rerun,
    spread_of,
)

VARIANCES = ((0, 0, 1), (0.01, 0.1, 1), (1, 0.1, 1), (0.1, 1, 1), (0.3, 0.3, 0.1), (1, 0, 0.2), (0, 1, 0.2))
"""Of a seed, an image, and both together."""
SIZES = [(seeds, images) for seeds in (3, 5, 8) for images in (10, 40)]
EXPERIMENTS = 2000


def simulated(seeds: int, images: int, variances: tuple, labels: int = 1, experiments: int = EXPERIMENTS) -> np.ndarray:
    """Return labels x experiments x seeds x images of losses that differ only by chance."""
    random = np.random.default_rng(seeds * images)
    shapes = (seeds, 1), (1, images), (seeds, images)
    return sum(
        v**0.5 * random.standard_normal((labels, experiments, *s)) for v, s in zip(variances, shapes, strict=True)
    )


def claims(differences: np.ndarray, level: float = LEVEL) -> np.ndarray:
    return np.abs(differences.mean((-2, -1))) > half_width(spread_of(differences), level)


# -- simulated experiments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variances", VARIANCES)
def test_without_a_difference_few_experiments_claim_one(variances):
    for size in SIZES:
        assert claims(simulated(*size, variances)).mean() <= 0.065, size  # 0.05, and the luck of 2000 experiments


@pytest.mark.parametrize("variances", VARIANCES)
def test_nor_do_more_of_them_when_they_compare_several_methods(variances):
    """With Holm's procedure, whose first step decides whether anything is significant."""
    for seeds in (2, 3, 5):
        losses = simulated(seeds, 40, variances, labels=6, experiments=600)
        assert claims(losses[1:] - losses[0], LEVEL / 5).any(0).mean() <= 0.08, seeds


@pytest.mark.parametrize("times", [3, 30])
def test_nor_do_more_of_them_when_one_method_is_noisier(times):
    for labels, seeds in ((3, 2), (5, 3)):
        losses = simulated(seeds, 20, (0.3, 0.3, 1), labels, experiments=1000)
        losses[-1] += times * 0.3**0.5 * np.random.default_rng(labels).standard_normal((1000, seeds, 1))
        pairs = [losses[b] - losses[a] for b in range(labels) for a in range(b)]
        assert np.any([claims(pair, LEVEL / len(pairs)) for pair in pairs], 0).mean() <= 0.065, labels


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", SIZES)
def test_a_difference_of_the_stated_size_is_found_in_four_of_five_new_experiments(size):
    """On average over the stated sizes, because each experiment estimates its spread badly."""
    for variances in VARIANCES[1:4]:
        spread = spread_of(simulated(*size, variances, experiments=200)[0])
        new = simulated(*size, variances, labels=2)[1]
        stated = [detectable(spread._replace(squares=spread.squares[:, i]), LEVEL)[0] for i in range(200)]
        lacking = half_width(spread_of(new), LEVEL) - new.mean((1, 2))
        found = np.mean([(each > lacking).mean() for each in stated])
        assert 0.75 < found < 0.89, variances  # more where what seeds or images do is near nothing


# -- by hand -----------------------------------------------------------------------------------------------------------

FOUR = np.array([[1.0, 2.0, 6.0], [3.0, 6.0, 6.0]])  # two seeds, three images: means 3 and 5; 2, 4 and 6; 4


def test_mean_squares_by_hand():
    spread = spread_of(FOUR)
    rest = sum((FOUR[s, i] - FOUR[s].mean() - FOUR[:, i].mean() + 4) ** 2 for s in range(2) for i in range(3))
    assert spread.squares == pytest.approx([3 * (1 + 1) / 1, 2 * (4 + 0 + 4) / 2, rest / 2])
    assert list(spread.degrees) == [1, 2, 2] and spread.number == 6


def test_half_width_by_hand():
    spread = spread_of(FOUR)
    (seeds, images, rest), (a, b, c) = spread.squares, (stats.t.ppf(0.975, df) ** 2 for df in (1, 2, 2))
    assert half_width(spread, 0.05) == pytest.approx(math.sqrt((a * seeds + b * images - c * rest) / 6))
    quiet = Spread(
        np.array([1.0, 20.0, 9.0]), np.array([2.0, 3.0, 6.0]), 12
    )  # seeds differ less than chance makes them
    assert half_width(quiet, 0.05) == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(20 / 12))
    quiet = Spread(np.array([20.0, 1.0, 9.0]), np.array([2.0, 3.0, 6.0]), 12)
    assert half_width(quiet, 0.05) == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(20 / 12))


def test_p_is_the_level_whose_interval_reaches_zero():
    spread = spread_of(FOUR)
    for level in (0.9, 0.3, 0.05, 1e-4):
        assert p_value(-float(half_width(spread, level)), spread) == pytest.approx(level)
    assert p_value(0.0, spread) == 1 and p_value(1e12, spread) == 1e-12


def test_the_interval_is_longer_on_the_side_of_the_long_tail():
    """By hand: the third central moment of the images' means, over six times their variance and number."""
    means = np.array([0.0, 0, 0, 0, 10])
    differences = means + np.array([[0.5, -0.5, 0.5, -0.5, 0], [-0.5, 0.5, -0.5, 0.5, 0]])
    spread = spread_of(differences)
    third, variance = ((means - 2) ** 3).sum() * 5 / (4 * 3), means.var(ddof=1)
    assert spread.skew == pytest.approx(third / variance / 6 / 5)
    low, high = interval_of(2.0, spread, 0.05)
    half = float(half_width(spread, 0.05))
    assert low == pytest.approx(2 - half)
    assert high == pytest.approx(2 + half + spread.skew * (1 + 2 * stats.t.ppf(0.975, 4) ** 2))
    assert p_value(2.0, spread) < p_value(-2.0, spread)


def test_ranks_of_five_seeds_or_more_count_unless_all_agree():
    means = np.array([1.0, 2, 3, 4, 5, -0.5])
    assert p_of_ranks(means[:4, None]) == 0 and p_of_ranks(means[:5, None]) == 0
    assert (
        p_of_ranks(means[:, None]) == pytest.approx(stats.wilcoxon(means).pvalue) and p_of_ranks(means[:, None]) > 0.05
    )
    assert list(p_of_ranks(np.stack([means, abs(means)])[..., None]) > 0) == [True, False]


def test_detectable_by_simulating_students_t():
    """Only seeds vary: the difference divided by one experiment's spread, plus t times that of another one."""
    spread = Spread(np.array([12.0, 0, 0]), np.array([3.0, 9, 27]), 40)
    chi = np.sqrt(np.random.default_rng(1).chisquare(3, (2, 200_000)) / 3)
    size, low, high = (each / math.sqrt(12 / 40) for each in detectable(spread, 0.05))
    normal = np.random.default_rng(2).standard_normal(200_000)
    assert (normal + size * chi[0] > stats.t.ppf(0.975, 3) * chi[1]).mean() == pytest.approx(0.8, abs=0.02)
    # with a known spread the effect is a quantile of t times the other experiment's spread, minus a normal value
    known = np.quantile(stats.t.ppf(0.975, 3) * chi[1] - normal, 0.8)
    ends = known / np.sqrt(stats.chi2.ppf([0.9, 0.1], 3) / 3)
    assert (low, high) == pytest.approx(tuple(ends), rel=0.15)


def test_every_reading_spends_a_part_of_the_level():
    assert [level_of(k) for k in (1, 2, 4)] == pytest.approx(
        [0.3 / math.pi**2, 0.075 / math.pi**2, 0.01875 / math.pi**2]
    )
    assert sum(map(level_of, range(1, 10_000))) == pytest.approx(LEVEL, rel=1e-3)


def test_a_claim_is_expected_to_be_smaller_by_integrating():
    spread = Spread(np.array([4.0, 0, 0]), np.array([5.0, 9, 45]), 60)
    error, least = math.sqrt(4 / 60), float(half_width(spread, 0.01))
    for size in (1.01 * least, 1.5 * least):

        def weight(true, size=size):
            return math.exp(-(((size - true) / error) ** 2) / 2) / stats.norm.cdf((true - least) / error)

        mean = integrate.quad(lambda true: true * weight(true), 0, 3 * size)[0] / integrate.quad(weight, 0, 3 * size)[0]
        assert expected(-size, spread, 0.01) == pytest.approx(-mean, rel=0.01) and mean < size
    assert expected(9 * least, spread, 0.01) == pytest.approx(9 * least, rel=0.01)
    few = Spread(np.array([4.0, 0, 0]), np.array([1.0, 9, 9]), 20)  # two seeds, and a strict level
    least = float(half_width(few, level_of(3)))
    assert 0 < expected(1.5 * least, few, level_of(3)) <= 1.5 * least


def test_one_more_seed_by_hand():
    low, high = rerun([2.0, 4.0, 9.0])
    half = 4.302653 * math.sqrt(13) * math.sqrt(4 / 3)  # Student's t of two degrees of freedom; a variance of 26 / 2
    assert (low, high) == (pytest.approx(5 - half), pytest.approx(5 + half))
    assert half > 5 and rerun([2.0, 4.0, 9.0], least=0) == (0, high)
    assert rerun([3.0]) is None and rerun([]) is None and rerun([3.0, 3.0]) == (3, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_one_more_seed_is_within_in_19_of_20(seeds):
    """On the same images, whether seeds or images vary more."""
    for variances in VARIANCES:
        means = simulated(seeds + 1, 10, variances, labels=1, experiments=2000)[0].mean(-1)
        inside = [low <= last <= high for *others, last in means for low, high in [rerun(others)]]
        assert np.mean(inside) == pytest.approx(0.95, abs=0.015), variances  # 0.01 is two deviations


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03], 3) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.01, 0.02, 0.5, 0.005], 4) == pytest.approx([0.03, 0.04, 0.5, 0.02])
    assert holm([0.6, 0.7], 2) == [1, 1] and holm([0.2], 1) == [0.2] and holm([], 0) == []
    assert holm([0.01, 0.001], 10) == pytest.approx([0.09, 0.01])  # of a larger family
