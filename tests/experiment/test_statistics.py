"""Verdicts: formulas by hand, and simulated experiments of which few may claim what is not there."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from reslora.experiment.statistics import (
    LEVEL,
    Spread,
    choice,
    choose,
    compare,
    detectable,
    half_width,
    holm,
    p_value,
    percents,
    rerun,
    spread_of,
    verdicts,
)

VARIANCES = ((0, 0, 1), (0.01, 0.1, 1), (1, 0.1, 1), (0.1, 1, 1), (0.3, 0.3, 0.1), (1, 0, 0.2), (0, 1, 0.2))
"""Of a seed, an image, and both together."""
SIZES = [(seeds, images) for seeds in (3, 5, 8) for images in (10, 40)]
EXPERIMENTS = 2000


def simulated(seeds: int, images: int, variances: tuple, labels: int = 1, experiments: int = EXPERIMENTS) -> np.ndarray:
    """Labels x experiments x seeds x images, of losses that differ by chance alone."""
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
    """With Holm, whose first step decides whether there is any claim."""
    for seeds in (2, 3, 5):
        losses = simulated(seeds, 40, variances, labels=6, experiments=600)
        assert claims(losses[1:] - losses[0], LEVEL / 5).any(0).mean() <= 0.08, seeds


def true_spread(seeds: int, images: int, variances: tuple) -> Spread:
    """As `detectable` reads one: the mean squares that are medians where these are the variances."""
    of_seed, of_image, rest = variances
    degrees = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)], float)
    squares = np.array([rest + images * of_seed, rest + seeds * of_image, rest])
    return Spread(squares * stats.chi2.median(degrees) / degrees, degrees)


@pytest.mark.exhaustive
@pytest.mark.parametrize("variances", VARIANCES)
def test_a_difference_of_the_detectable_size_is_found_in_four_of_five_cases(variances):
    for size in SIZES:
        for level in (LEVEL, LEVEL / 4):
            difference = detectable(true_spread(*size, variances), level)
            found = claims(simulated(*size, variances)[0] - difference, level).mean()
            assert found == pytest.approx(0.8, abs=0.035), (size, level)


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", SIZES)
def test_half_of_experiments_say_that_more_is_detectable_than_is(size):
    """Of few seeds an experiment knows its own spread badly, but not too low or too high as a rule."""
    for variances in ((0.01, 0.1, 1), (1, 0.1, 1)):
        spread = spread_of(simulated(*size, variances, experiments=150)[0])
        said = [detectable(Spread(spread.squares[:, i], spread.degrees), LEVEL) for i in range(150)]
        assert np.median(said) == pytest.approx(detectable(true_spread(*size, variances), LEVEL), rel=0.2)


# -- by hand -----------------------------------------------------------------------------------------------------------

FOUR = np.array([[1.0, 2.0, 6.0], [3.0, 6.0, 6.0]])  # two seeds, three images: means 3 and 5; 2, 4 and 6; 4


def test_mean_squares_by_hand():
    spread = spread_of(FOUR)
    rest = sum((FOUR[s, i] - FOUR[s].mean() - FOUR[:, i].mean() + 4) ** 2 for s in range(2) for i in range(3))
    assert spread.squares == pytest.approx([3 * (1 + 1) / 1, 2 * (4 + 0 + 4) / 2, rest / 2])
    assert list(spread.degrees) == [1, 2, 2] and spread.differences == 6


def test_half_width_by_hand():
    spread = spread_of(FOUR)
    (seeds, images, rest), (a, b, c) = spread.squares, (stats.t.ppf(0.975, df) ** 2 for df in (1, 2, 2))
    assert half_width(spread, 0.05) == pytest.approx(math.sqrt((a * seeds + b * images - c * rest) / 6))
    quiet = Spread(np.array([1.0, 20.0, 9.0]), np.array([2.0, 3.0, 6.0]))  # seeds differ less than chance makes them
    assert half_width(quiet, 0.05) == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(20 / 12))
    quiet = Spread(np.array([20.0, 1.0, 9.0]), np.array([2.0, 3.0, 6.0]))
    assert half_width(quiet, 0.05) == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(20 / 12))


def test_p_is_the_level_whose_interval_reaches_zero():
    spread = spread_of(FOUR)
    for level in (0.9, 0.3, 0.05, 1e-4):
        assert p_value(-float(half_width(spread, level)), spread) == pytest.approx(level)
    assert p_value(0.0, spread) == 1 and p_value(1e12, spread) == 1e-12


def test_detectable_by_integrating_over_a_students_t():
    """Seeds alone vary: the noncentral t's power, and the median of a chi-squared for the spread."""
    spread = Spread(np.array([12.0, 0, 0]), np.array([3.0, 9, 27]))
    deviation = math.sqrt(12 * 3 / stats.chi2.median(3) / 40)
    reached = detectable(spread, 0.05) / deviation
    power = integrate.quad(lambda t: stats.nct.pdf(t, 3, reached), stats.t.ppf(0.975, 3), np.inf)[0]
    assert power == pytest.approx(0.8, abs=0.02)


def test_one_more_seed_by_hand():
    low, high = rerun([2.0, 4.0, 9.0])
    half = 4.302653 * math.sqrt(13) * math.sqrt(4 / 3)  # Student's t of two degrees of freedom; a variance of 26 / 2
    assert (low, high) == (pytest.approx(5 - half), pytest.approx(5 + half))
    assert half > 5 and rerun([2.0, 4.0, 9.0], least=0) == (0, high)
    assert rerun([3.0]) is None and rerun([]) is None and rerun([3.0, 3.0]) == (3, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_one_more_seed_is_within_in_19_of_20(seeds):
    """On the same images, whichever of seeds and images varies more."""
    for variances in VARIANCES:
        means = simulated(seeds + 1, 10, variances, labels=1, experiments=2000)[0].mean(-1)
        inside = [low <= last <= high for *others, last in means for low, high in [rerun(others)]]
        assert np.mean(inside) == pytest.approx(0.95, abs=0.015), variances  # 0.01 is two deviations


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.01, 0.02, 0.5, 0.005]) == pytest.approx([0.03, 0.04, 0.5, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


# -- in words ----------------------------------------------------------------------------------------------------------


def losses_of(shift: float, noise: float = 0.001, seeds: int = 3, images: int = 12) -> np.ndarray:
    """0.5 on average, with harder and easier images, and `shift` percent more."""
    random = np.random.default_rng(round(1000 * shift) + 10_000)
    images = np.linspace(0.3, 0.7, images)
    return images * (1 + shift / 100) + noise * random.standard_normal((seeds, len(images)))


def verdict(reference: np.ndarray, ours: np.ndarray) -> dict:
    (found,) = verdicts({"lora": reference, "reslora": ours}, {"reslora": "lora"})
    return found


def test_a_better_and_a_worse_method():
    found = verdict(losses_of(0), losses_of(-1.2))
    low, high = found["interval"]
    assert found["conclusion"] == "better" and low < found["relative"] < high < 0 and found["p_holm"] < 0.05
    assert found["relative"] == pytest.approx(100 * found["difference"] / losses_of(0).mean())
    difference = losses_of(-1.2) - losses_of(0)
    assert high - low == pytest.approx(200 * float(half_width(spread_of(difference), 0.05)) / losses_of(0).mean())
    assert found["rerun"] == pytest.approx(rerun(100 * difference.mean(1) / losses_of(0).mean()))
    size, least, most = percents(found["relative"], high, low)
    expected = f"reslora is better than lora: test loss {size}% lower (95% interval {least} to {most}%)"
    assert found["sentence"] == expected and float(least) < float(size) < float(most)
    found = verdict(losses_of(0), losses_of(1.2))
    assert found["conclusion"] == "worse" and "reslora is worse than lora: test loss 1" in found["sentence"]
    least, most = found["sentence"].split("interval ")[1].rstrip("%)").split(" to ")
    assert "% higher (95%" in found["sentence"] and float(least) < float(most)


def test_sizes_have_as_many_places_as_the_smallest_needs_and_at_most_four():
    assert percents(-12.34) == ["12.3"] and percents(0.26) == ["0.3"] and percents(0) == ["0.0"]
    assert percents(0.026, -1, 0) == ["0.03", "1.00", "0.00"]
    assert percents(0.0026) == ["0.003"] and percents(0.00026) == ["0.0003"] and percents(0.000026) == ["0.0000"]


def test_no_difference_shown_says_what_could_have_been():
    found = verdict(losses_of(0), losses_of(0.01))
    (size,) = percents(found["detectable"])
    assert found["conclusion"] == "not shown"
    assert found["sentence"] == f"no difference between reslora and lora shown (could have shown {size}%)"
    low, high = found["interval"]
    assert low < 0 < high and found["p"] == found["p_holm"] > 0.05


def test_several_methods_share_the_level():
    """A difference that is one alone is none among many, and is said to be so."""
    losses = {"lora": losses_of(0)} | {f"none {i}": losses_of(0.001 * i) for i in range(1, 5)}
    close = next(
        ours
        for shift in np.arange(0.05, 1.5, 0.01)
        for ours in [losses_of(-shift)]
        if 0.015 < verdict(losses["lora"], ours)["p"] < 0.04
    )
    alone = verdict(losses["lora"], close)
    assert alone["conclusion"] == "better"
    among = verdicts(losses | {"reslora": close}, dict.fromkeys([*list(losses)[1:], "reslora"], "lora"))[-1]
    assert among["label"] == "reslora" and among["conclusion"] == "not shown" and among["p"] == alone["p"]
    assert among["p_holm"] == pytest.approx(5 * alone["p"]) and among["detectable"] > alone["detectable"]
    assert "shown when all comparisons are counted (could have shown" in among["sentence"]


def test_one_seed_or_image_cannot_tell():
    found = verdict(losses_of(0)[:1], losses_of(-1.2)[:1])
    assert found["interval"] is found["rerun"] is found["p"] is found["p_holm"] is found["detectable"] is None
    assert found["sentence"].startswith("one seed cannot tell reslora from lora: test loss 1.")
    assert found["sentence"].endswith("% lower, which may be luck") and found["conclusion"] == "cannot tell"
    found = verdict(losses_of(0)[:, :1], losses_of(-1.2)[:, :1])
    assert found["sentence"].startswith("one test image cannot tell") and found["images"] == 1


def test_equal_losses_and_losses_apart_by_a_constant():
    found = verdict(losses_of(0), losses_of(0))
    assert found["sentence"] == "reslora and lora have the same test losses" and found["conclusion"] == "not shown"
    assert (found["p"], found["interval"], found["detectable"]) == (1, (0, 0), 0)
    found = verdict(losses_of(0), losses_of(0) + 0.25)
    assert (
        found["conclusion"] == "worse" and found["interval"] == pytest.approx((50, 50), rel=1e-3) and found["p"] < 1e-9
    )


def test_missing_seeds_are_left_out_and_told():
    ours, theirs = losses_of(-1.2, seeds=5), losses_of(0, seeds=5)
    ours[1], theirs[4, 3] = np.nan, np.inf
    found = verdict(theirs, ours)
    left = verdict(theirs[[0, 2, 3]], ours[[0, 2, 3]])
    assert found["seeds"] == 3 and found["interval"] == left["interval"]
    assert found["sentence"] == left["sentence"] + "; 2 of 5 seeds are missing"
    ours[[0, 2, 3]] = np.nan
    assert verdicts({"lora": theirs, "reslora": ours}, {"reslora": "lora"}) == []


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (losses_of(0, seeds=2), r"reslora has losses of shape \(2, 12\)"),
        (losses_of(0, images=3), r"reslora has losses of shape \(3, 3\)"),
        (losses_of(0)[0], r"reslora has losses of shape \(12,\)"),
        (losses_of(0) - 0.5, r"reslora has a test loss of -0\.2\d+, and a loss is above zero"),
    ],
)
def test_what_is_no_table_of_losses_is_refused(ours, words):
    with pytest.raises(ValueError, match=words):
        verdict(losses_of(0), ours)


# -- from the record ---------------------------------------------------------------------------------------------------


def arm(label: str, rate: float, seed: int, **more) -> dict:
    method = label.split()[0]
    found = {"label": label, "method": method, "learning_rate": rate, "seed": seed, "rank": 4, "status": "finished"}
    return found | {"select_by_step": {"50": 0.4, "100": 0.3}, "test": None} | more


def measured(losses: np.ndarray, images: tuple = ("a", "b", "c")) -> dict:
    return {"images": list(images), "losses": [float(loss) for loss in losses], "by_timestep": []}


def test_arms_at_the_chosen_rate_are_compared():
    theirs, ours = losses_of(0, images=3), losses_of(-2, images=3)
    arms = [arm("lora", 1e-4, seed, test=measured(theirs[seed])) for seed in (2, 0, 1)]
    arms += [arm("reslora", 2e-4, seed, test=measured(ours[seed])) for seed in range(3)]
    arms += [arm("reslora", 1e-4, seed, test=measured(9 * ours[seed])) for seed in range(3)]  # not the chosen rate
    chosen = {"lora": {"learning_rate": 1e-4}, "reslora": {"learning_rate": 2e-4}}
    assert compare(arms, chosen) == [verdict(theirs, ours)]
    assert compare(arms[3:], chosen) == [] == compare([], {})
    fewer = compare(arms[1:], chosen)
    assert fewer[0]["seeds"] == 2 and fewer[0]["sentence"].endswith("; 1 of 3 seeds is missing")
    arms[0]["test"]["losses"][1] = None
    assert compare(arms, chosen) == fewer
    with pytest.raises(ValueError, match="different test images"):
        compare([*arms[:3], arm("reslora", 2e-4, 0, test=measured(ours[0], ("a", "c", "b")))], chosen)


def test_the_reference_is_lora_of_the_same_rank():
    labels = {"reslora rank 4": 4, "lora rank 4": 4, "lora rank 8": 8, "reslora rank 8": 8, "loha": 2}
    arms = [
        arm(label, 1e-4, seed, rank=rank, test=measured(losses_of(seed + 5 * rank, images=3)[0]))
        for label, rank in labels.items()
        for seed in range(2)
    ]
    chosen = {label: {"learning_rate": 1e-4} for label in labels}
    found = {each["label"]: each["reference"] for each in compare(arms, chosen)}
    expected = {"reslora rank 4": "lora rank 4", "lora rank 8": "lora rank 4", "reslora rank 8": "lora rank 8"}
    assert found == expected | {"loha": "lora rank 4"}


def test_rate_and_step_are_chosen_over_seeds_together():
    losses = {
        1e-4: [{"50": 0.50, "100": 0.40}, {"50": 0.50, "100": 0.42}],
        2e-4: [{"50": 0.30, "100": 0.10}, {"50": 0.36, "100": 0.90}],  # the best loss of all, by luck
        4e-4: [{"50": 0.45, "100": 0.60}, {"50": 0.45, "100": 0.60}],
    }
    expected = {"learning_rate": 2e-4, "step": 50, "loss": pytest.approx(0.33), "at_end": None, "next": None}
    assert choice(losses) == expected


@pytest.mark.parametrize(
    ("losses", "at_end", "following"),
    [
        ((1, 2, 3), "low", 5e-5),
        ((3, 2, 1), "high", 8e-4),
        ((3, 1, 2), None, None),
        ((3, 1, None), None, None),  # it diverged, which is an end of the grid too
        ((2, 2, 3), "low", 5e-5),
    ],
)
def test_a_best_rate_at_an_end_of_the_grid_has_a_next_one(losses, at_end, following):
    found = choice({rate: [{"50": loss}] for rate, loss in zip((1e-4, 2e-4, 4e-4), losses, strict=True)})
    assert (found["at_end"], found["next"]) == (at_end, following)


def test_the_next_rate_continues_by_the_step_at_that_end():
    rates = (1e-4, 2e-4, 3e-4, 9e-4)
    for losses, following in (((1, 2, 3, 4), 5e-5), ((4, 3, 2, 1), 2.7e-3)):
        assert choice({rate: [{"50": loss}] for rate, loss in zip(rates, losses, strict=True)})["next"] == following


@pytest.mark.parametrize(("beside", "loss", "following"), [(0.1, None, 1e-5), (0.1, 1, 1e-7), (2e-4, None, 5e-5)])
def test_a_rate_that_diverged_far_away_says_no_step(beside, loss, following):
    assert choice({1e-4: [{"50": 0.5}], beside: [{"50": loss}]})["next"] == following


def test_a_rate_with_fewer_seeds_says_the_step():
    assert choice({1e-4: [{"50": 0.5}] * 2, 1e-2: [{"50": 0.6}]})["next"] == 1e-6


@pytest.mark.parametrize(("trained", "at_end"), [((0, 1), None), ((1,), None), ((2,), None), ((1, 2), "high")])
def test_an_end_is_one_of_all_rates_beside_one_that_was_tried(trained, at_end):
    """The time was up before the others, which say more than a further rate would."""
    losses = [[{"50": 0.5 - 0.1 * place}] if place in trained else [] for place in range(3)]
    assert choice(dict(zip((1e-4, 2e-4, 4e-4), losses, strict=True)))["at_end"] == at_end


def test_one_rate_has_no_ends_and_nothing_finite_is_no_choice():
    assert choice({1e-4: [{"50": 0.5}]}) | {"loss": 0} == {
        "learning_rate": 1e-4, "step": 50, "loss": 0, "at_end": None, "next": None,
    }  # fmt: skip
    for losses in ({}, {1e-4: []}, {1e-4: [{}]}, {1e-4: [{"50": None}]}, {1e-4: [{"50": math.nan}]}):
        assert choice(losses) is None


def test_what_not_all_seeds_have_is_not_chosen():
    """A rate with fewer seeds, a step that one lacks, a step at which one is not finite."""
    seeds = [{"50": 0.5, "100": 0.1, "150": 0.2}, {"50": 0.5, "150": None}]
    found = choice({1e-4: seeds, 2e-4: [{"50": 0.1}]})
    assert (found["learning_rate"], found["step"], found["at_end"]) == (1e-4, 50, "low")
    # The end of what is left, but not of what was tried.
    found = choice({1e-4: seeds, 2e-4: seeds, 5e-5: [{"50": 0.1}]})
    assert (found["learning_rate"], found["at_end"], found["next"]) == (1e-4, None, None)


def test_labels_choose_among_arms_that_have_ended():
    arms = [arm("lora", 1e-4, 0), arm("lora", 2e-4, 0, select_by_step={"50": 0.1}, status="running")]
    arms += [arm("reslora", 1e-4, 0), arm("reslora", 2e-4, 0, select_by_step={"50": 0.1}, status="failed")]
    arms += [arm("loha", 1e-4, 0, status="failed"), arm("lokr", 1e-4, 0, status="waiting")]
    found = choose(arms)
    assert list(found) == ["lora", "reslora"]
    assert all(each["learning_rate"] == 1e-4 and each["step"] == 100 for each in found.values())
    assert [each["at_end"] for each in found.values()] == [None, "low"]
    waiting = [arm("oft", 1e-4, 0), arm("oft", 2e-4, 0), arm("oft", 4e-4, 0, status="waiting")]
    waiting[1]["select_by_step"] = {"100": 0.01}
    assert choose(waiting)["oft"] | {"loss": 0} == {
        "learning_rate": 2e-4, "step": 100, "loss": 0, "at_end": None, "next": None,
    }  # fmt: skip
