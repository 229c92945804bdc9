"""Verdicts: formulas by hand, and simulated experiments, few of which may report a difference that does not exist."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from reslora.experiment.statistics import (
    LEVEL,
    Effects,
    detectable,
    effects_of,
    expected,
    judge,
    level_of,
    p_value,
    rank_interval,
    rerun,
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
    return np.abs(differences.mean((-2, -1))) > effects_of(differences).half_width(level)


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
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_a_difference_of_the_stated_size_is_found_in_four_of_five_new_experiments(seeds):
    """On average over the stated sizes, because each experiment estimates its spread badly."""
    for variances in VARIANCES[1:4]:
        first, new = simulated(seeds, 20, variances, labels=2, experiments=EXPERIMENTS)
        stated = [detectable(effects_of(first[i]).squares, (seeds, 20), 0.01, 0.03)[0] for i in range(60)]
        needed = np.minimum(effects_of(new).interval(0.01)[0], rank_interval(new.mean(-1), 0.03)[0])
        needed = np.minimum(needed, rank_interval(new.mean(-2), 0.03)[0])
        found = np.mean([(needed + each > 0).mean() for each in stated])
        assert 0.75 < found < 0.9, variances


# -- by hand -----------------------------------------------------------------------------------------------------------

FOUR = np.array([[1.0, 2.0, 6.0], [3.0, 6.0, 6.0]])  # two seeds, three images: means 3 and 5; 2, 4 and 6; 4


def of_squares(seeds: tuple[int, float], units: tuple[int, float], rest: float) -> Effects:
    """Return effects with a number of seeds and units, and their mean squares."""
    parts = []
    for (number, square), repeats in ((seeds, units[0]), (units, seeds[0])):
        effects = np.arange(number) - (number - 1) / 2
        parts.append(effects * math.sqrt(square / repeats / effects.var(ddof=1)))
    return Effects(np.array(0.0), *parts, np.array(rest))


def test_mean_squares_by_hand():
    effects = effects_of(FOUR)
    rest = sum((FOUR[s, i] - FOUR[s].mean() - FOUR[:, i].mean() + 4) ** 2 for s in range(2) for i in range(3))
    assert effects.squares == pytest.approx([3 * (1 + 1) / 1, 2 * (4 + 0 + 4) / 2, rest / 2])
    assert list(effects.degrees) == [1, 2, 2] and effects.number == 6 and effects.mean == 4


def test_half_width_by_hand():
    effects = effects_of(FOUR)
    (seeds, images, rest), (a, b, c) = effects.squares, (stats.t.ppf(0.975, df) ** 2 for df in (1, 2, 2))
    assert effects.half_width(0.05) == pytest.approx(math.sqrt((a * seeds + b * images - c * rest) / 6))
    quiet = of_squares((3, 1.0), (4, 20.0), 9.0)  # seeds differ less than chance makes them
    assert quiet.half_width(0.05) == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(20 / 12))
    quiet = of_squares((3, 20.0), (4, 1.0), 9.0)
    assert quiet.half_width(0.05) == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(20 / 12))


def test_p_is_the_level_whose_interval_reaches_zero():
    effects = of_squares((3, 4.0), (6, 3.0), 1.0)
    for level in (0.9, 0.3, 0.05, 1e-4):
        assert p_value(effects._replace(mean=-effects.half_width(level))) == pytest.approx(level)
    assert p_value(effects) == 1 and p_value(effects._replace(mean=np.array(1e12))) == 1e-12


def test_the_interval_is_longer_on_the_side_of_the_long_tail():
    """By hand: the third central moment of the images' means, over six times their variance and number."""
    means = np.array([0.0, 0, 0, 0, 10])
    effects = effects_of(means + np.array([[0.5, -0.5, 0.5, -0.5, 0], [-0.5, 0.5, -0.5, 0.5, 0]]))
    third, variance = ((means - 2) ** 3).sum() * 5 / (4 * 3), means.var(ddof=1)
    low, high = effects.interval(0.05)
    half, skewness = float(effects.half_width(0.05)), third / variance / 6 / 5
    assert low == pytest.approx(2 - half)
    assert high == pytest.approx(2 + half + skewness * (1 + 2 * stats.t.ppf(0.975, 4) ** 2))
    assert p_value(effects) < p_value(effects._replace(mean=np.array(-2.0)))


@pytest.mark.parametrize("number", [5, 6, 8, 13, 30])
def test_the_interval_by_ranks_is_that_of_wilcoxons_test(number):
    """Values that all have the same sign pass, even if their number is too small for the level."""
    values = np.random.default_rng(number).standard_normal((300, number)) + 0.4
    for level in (0.03, 0.07):
        low, high = rank_interval(values, level)
        p = stats.wilcoxon(values, axis=-1, method="exact").pvalue
        assert list((low > 0) | (high < 0)) == list(p <= max(level, 2.0 ** (1 - number)) + 1e-12)
        assert 0 < ((low > 0) | (high < 0)).mean() < 1
    few, many = rank_interval(values[:, :4], 0.03), rank_interval(np.tile(values, 7)[:, :31], 0.03)
    assert all((low == math.inf).all() and (high == -math.inf).all() for low, high in (few, many))


def test_a_single_seed_or_image_cannot_decide():
    """Signed ranks have to agree. The comparison names what differs most from the others."""
    random = np.random.default_rng(1)
    noise = 0.01 * random.standard_normal((8, 12))
    by_seed = np.array([1.0, 1, 1, 1, 1, 1, -0.9, -1.1])[:, None] + noise
    (found,) = judge({"a": 9 + by_seed * 0, "b": 9 + by_seed}, [("b", "a")])
    found.corrected = 0.001
    assert found.disagrees == 0 and not found.significant and found.farthest[0] == 7
    by_image = np.where(np.arange(12) < 8, 1.0, -1.2) + noise
    (found,) = judge({"a": 9 + by_image * 0, "b": 9 + by_image}, [("b", "a")])
    found.corrected = 0.001
    assert found.disagrees == 1 and not found.significant and found.farthest[1] >= 8
    (found,) = judge({"a": 9 + noise * 0, "b": 8 + noise}, [("b", "a")])
    assert found.disagrees is None and found.significant


def test_detectable_by_simulating_students_t():
    """Only seeds vary: the difference divided by one experiment's spread, plus t times that of another one."""
    effects = of_squares((4, 12.0), (10, 1e-9), 1e-9)
    chi = np.sqrt(np.random.default_rng(1).chisquare(3, (2, 200_000)) / 3)
    size, low, high = (each / math.sqrt(12 / 40) for each in detectable(effects.squares, (4, 10), 0.05, 0.05))
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
    effects = of_squares((6, 4.0), (10, 1e-12), 1e-12)
    error, least = math.sqrt(4 / 60), float(effects.half_width(0.01))
    for size in (1.01 * least, 1.5 * least):

        def weight(true, size=size):
            return math.exp(-(((size - true) / error) ** 2) / 2) / stats.norm.cdf((true - least) / error)

        mean = integrate.quad(lambda true: true * weight(true), 0, 3 * size)[0] / integrate.quad(weight, 0, 3 * size)[0]
        found = expected(effects._replace(mean=np.array(-size)), 0.01)
        assert found == pytest.approx(-mean, rel=0.01) and mean < size
    assert expected(effects._replace(mean=np.array(9 * least)), 0.01) == pytest.approx(9 * least, rel=0.01)
    few = of_squares((2, 4.0), (10, 1e-12), 1e-12)  # two seeds, and a strict level
    size = 1.5 * few.half_width(level_of(3))
    assert 0 < expected(few._replace(mean=size), level_of(3)) <= size


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


def test_p_values_are_corrected_by_holm():
    """By hand, in a family of three and of ten comparisons, at the levels of two evaluations."""
    random = np.random.default_rng(0)
    losses = {"lora": 5 + 0.1 * random.standard_normal((3, 20))}
    losses |= {
        name: losses["lora"] + shift + 0.1 * random.standard_normal((3, 20))
        for name, shift in zip("abc", (0.1, 0.6, 0), strict=True)
    }
    for family, reading in ((3, 1), (10, 2)):
        found = sorted(judge(losses, [(name, "lora") for name in "abc"], reading, family), key=lambda each: each.p)
        holm = np.maximum.accumulate([min(1, (family - rank) * each.p) for rank, each in enumerate(found)])
        assert [each.corrected for each in found] == pytest.approx(np.minimum(1, holm * LEVEL / level_of(reading)))
        rejected = sum(holm < level_of(reading))
        levels = [level_of(reading) / (family - min(rank, rejected)) for rank in range(3)]
        assert [each.level for each in found] == pytest.approx(levels) and 0 < rejected < 3
