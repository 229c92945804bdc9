"""Verdicts: formulas by hand, and simulated experiments, few of which may report a difference that does not exist."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from reslora.experiment.statistics import (
    LEVEL,
    PRIOR,
    Spread,
    arrays_of,
    choice,
    choose,
    compare,
    counts_of,
    coverage_in_words,
    detectable,
    equal_pairs,
    expected,
    half_width,
    holm,
    judge,
    level_of,
    moderated,
    p_value,
    percents,
    ranking_of,
    rerun,
    spread_of,
    verdict_of,
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


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("times", [1, 3])
def test_all_pairs_with_moderated_spreads_claim_few_even_if_one_method_spreads_three_times_as_much(seeds, times):
    for labels in (3, 5):
        losses = simulated(seeds, 20, (0.3, 0.3, 1), labels, experiments=1000)
        spread = times**2 - 1  # more variance of its seeds
        losses[-1] += (0.3 * spread) ** 0.5 * np.random.default_rng(labels).standard_normal((1000, seeds, 1))
        pairs = [losses[b] - losses[a] for b in range(labels) for a in range(b)]
        shared = np.mean([spread_of(pair).squares[0] for pair in pairs], 0)
        level = level_of(1) / counts_of(len(pairs), labels)[0]
        spreads = [moderated(spread_of(pair), shared, labels) for pair in pairs]
        found = [abs(p.mean((1, 2))) > half_width(s, level) for p, s in zip(pairs, spreads, strict=True)]
        assert np.any(found, 0).mean() <= 0.065, labels


@pytest.mark.exhaustive
@pytest.mark.parametrize("size", SIZES)
def test_a_difference_of_the_stated_size_is_found_in_four_of_five_new_experiments(size):
    """On average over the stated sizes, because each experiment estimates its spread badly."""
    for variances in VARIANCES[1:4]:
        spread = spread_of(simulated(*size, variances, experiments=200)[0])
        new = simulated(*size, variances, labels=2)[1]
        stated = [detectable(spread._replace(squares=spread.squares[:, i]), LEVEL) for i in range(200)]
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


def test_detectable_by_simulating_students_t():
    """Only seeds vary: the difference divided by one experiment's spread, plus t times that of another one."""
    spread = Spread(np.array([12.0, 0, 0]), np.array([3.0, 9, 27]), 40)
    chi = np.sqrt(np.random.default_rng(1).chisquare(3, (2, 200_000)) / 3)
    size = detectable(spread, 0.05) / math.sqrt(12 / 40)
    normal = np.random.default_rng(2).standard_normal(200_000)
    assert (normal + size * chi[0] > stats.t.ppf(0.975, 3) * chi[1]).mean() == pytest.approx(0.8, abs=0.01)


def test_seeds_of_a_pair_are_moderated_by_hand():
    spread = Spread(np.array([6.0, 2, 1]), np.array([2.0, 9, 18]), 30)
    for labels, more in ((2, 0), (3, 2), (9, PRIOR)):
        found = moderated(spread, 3.0, labels)
        assert found.squares == pytest.approx([(2 * 6 + more * 3) / (2 + more), 2, 1])
        assert list(found.degrees) == [2 + more, 9, 18] and found.number == 30


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
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.01, 0.02, 0.5, 0.005]) == pytest.approx([0.03, 0.04, 0.5, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.04, 0.01, 0.03], [3, 1, 1]) == pytest.approx([0.04, 0.03, 0.03])


def test_pairs_that_may_be_equal_at_once_by_hand():
    """Of four methods, these can be equal: all six pairs, three, two, one or none, but not five or four."""
    assert sorted(equal_pairs(3)) == [0, 1, 3] and sorted(equal_pairs(4)) == [0, 1, 2, 3, 6]
    assert counts_of(3, 3) == [3, 1, 1] and counts_of(6, 4) == [6, 3, 3, 3, 2, 1]
    assert counts_of(2, 3) == [2, 1]  # a pair is missing


# -- in words ----------------------------------------------------------------------------------------------------------


def losses_of(shift: float, noise: float = 0.001, seeds: int = 3, images: int = 12) -> np.ndarray:
    """Return losses of 0.5 on average, with harder and easier images, and `shift` percent more."""
    random = np.random.default_rng(round(1000 * shift) + 10_000)
    images = np.linspace(0.3, 0.7, images)
    return images * (1 + shift / 100) + noise * random.standard_normal((seeds, len(images)))


def verdicts(losses: dict, references: dict) -> list[dict]:
    return [verdict_of(*test) for test in judge(arrays_of(losses), references.items())]


def verdict(reference: np.ndarray, ours: np.ndarray) -> dict:
    (found,) = verdicts({"lora": reference, "reslora": ours}, {"reslora": "lora"})
    return found


def test_a_better_and_a_worse_method():
    found = verdict(losses_of(0), losses_of(-1.2))
    low, high = found["interval"]
    assert found["conclusion"] == "better" and low < found["relative"] < high < 0 and found["p_holm"] < 0.05
    assert found["relative"] == pytest.approx(100 * found["difference"] / losses_of(0).mean())
    difference = losses_of(-1.2) - losses_of(0)
    assert high - low == pytest.approx(
        200 * float(half_width(spread_of(difference), level_of(1))) / losses_of(0).mean()
    )
    assert found["rerun"] == pytest.approx(rerun(100 * difference.mean(1) / losses_of(0).mean()))
    size, least, most = percents(found["relative"], high, low)
    words = f"reslora is better than lora: test loss {size}% lower (97% interval {least} to {most}%); expect about "
    assert found["sentence"] == f"{words}{percents(found['expected'])[0]}%" and float(least) < float(size) < float(most)
    assert found["relative"] < found["expected"] < 0 and found["of_gain"] is None
    found = verdict(losses_of(0), losses_of(1.2))
    assert found["conclusion"] == "worse" and "reslora is worse than lora: test loss 1" in found["sentence"]
    least, most = found["sentence"].split("interval ")[1].partition("%)")[0].split(" to ")
    assert "% higher (97%" in found["sentence"] and float(least) < float(most)


def test_an_interval_says_its_true_coverage():
    """The k-th evaluation has the level 0.05 x 6 / (pi k)^2."""
    words = [coverage_in_words(level_of(reading)) for reading in (1, 2, 3, 6, 20)]
    assert words == ["97%", "99.2%", "99.7%", "99.92%", "99.992%"] and coverage_in_words(0.05) == "95%"


def test_sizes_have_as_many_places_as_the_smallest_needs_and_at_most_four():
    assert percents(-12.34) == ["12.3"] and percents(0.26) == ["0.3"] and percents(0) == ["0.0"]
    assert percents(0.026, -1, 0) == ["0.03", "1.00", "0.00"]
    assert percents(0.0026) == ["0.003"] and percents(0.00026) == ["0.0003"] and percents(0.000026) == ["0.0000"]


def test_no_difference_shown_says_what_could_have_been():
    found = verdict(losses_of(0), losses_of(0.01))
    (size,) = percents(found["detectable"])
    assert found["conclusion"] == "not shown"
    words = f"no significant difference between reslora and lora (minimum detectable effect {size}%)"
    low, high = found["interval"]
    assert found["sentence"] == words and found["expected"] is None
    assert (
        low < 0 < high and found["p_holm"] == pytest.approx(min(1, found["p"] * math.pi**2 / 6)) and found["p"] > 0.05
    )


def test_with_two_seeds_it_is_not_known_what_is_detectable():
    """The stated size would vary by a factor of ten."""
    found = verdict(losses_of(0, seeds=2), losses_of(0.01, seeds=2))
    assert found["detectable"] is None and found["interval"]
    assert found["sentence"].endswith("(minimum detectable effect not known with two seeds)")


def test_several_methods_share_the_level():
    """A difference that is significant in a single comparison is not among many, and the verdict says why."""
    losses = {"lora": losses_of(0)} | {f"none {i}": losses_of(0.001 * i) for i in range(1, 5)}
    close = next(
        ours
        for shift in np.arange(0.05, 1.5, 0.01)
        for ours in [losses_of(-shift)]
        if 0.01 < verdict(losses["lora"], ours)["p"] < 0.025
    )
    alone = verdict(losses["lora"], close)
    assert alone["conclusion"] == "better"
    among = verdicts(losses | {"reslora": close}, dict.fromkeys([*list(losses)[1:], "reslora"], "lora"))[-1]
    assert among["label"] == "reslora" and among["conclusion"] == "not shown"
    assert among["p_holm"] == pytest.approx(min(1, 5 * among["p"] * math.pi**2 / 6))


def test_one_seed_or_image_cannot_tell():
    found = verdict(losses_of(0)[:1], losses_of(-1.2)[:1])
    assert found["interval"] is found["rerun"] is found["p"] is found["p_holm"] is found["detectable"] is None
    assert found["sentence"].startswith("one seed cannot tell reslora from lora: test loss 1.")
    assert found["sentence"].endswith("% lower, which may be seed noise") and found["conclusion"] == "cannot tell"
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
        (losses_of(0) - 0.5, r"reslora has a test loss of -0\.2\d+, but losses must be above zero"),
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
    (found,), ranking = compare(arms, chosen)
    assert found == verdict(theirs, ours) and ranking["best"] == ["lora", "reslora"]
    assert compare(arms[3:], chosen) == ([], None) == compare([], {})
    fewer, _ = compare(arms[1:], chosen)
    assert fewer[0]["seeds"] == 2 and fewer[0]["sentence"].endswith("; 1 of 3 seeds is missing")
    arms[0]["test"]["losses"][1] = None
    assert compare(arms, chosen)[0] == fewer
    with pytest.raises(ValueError, match="different test images"):
        compare([*arms[:3], arm("reslora", 2e-4, 0, test=measured(ours[0], ("a", "c", "b")))], chosen)


def test_a_difference_is_also_a_part_of_what_training_gains():
    theirs, ours = losses_of(0), losses_of(-2)
    both = {"lora": theirs, "reslora": ours}.items()
    arms = [arm(name, 1e-4, seed, test=measured(found[seed], range(12))) for name, found in both for seed in range(3)]
    chosen = {label: {"learning_rate": 1e-4} for label in ("lora", "reslora")}
    base = {"images": list(range(12)), "losses": [0.9, 1.1] * 6}
    ((found,), _) = compare(arms, chosen, base=base)
    assert found["of_gain"] == pytest.approx(100 * (ours - theirs).mean() / (1 - theirs.mean()))
    assert f"), {percents(found['of_gain'])[0]}% of what training gains; expect" in found["sentence"]
    base["losses"][0] = None
    assert compare(arms, chosen, base=base)[0][0]["of_gain"] is None


def test_a_later_reading_asks_for_more():
    theirs = losses_of(0)
    ours = next(
        ours for shift in np.arange(0.05, 1.5, 0.01) for ours in [losses_of(-shift)]
        if 0.01 < verdict(theirs, ours)["p"] < 0.03
    )  # fmt: skip
    arrays = arrays_of({"lora": theirs, "reslora": ours})
    first, second = (judge(arrays, [("reslora", "lora")], k)[0][1] for k in (1, 2))
    assert first.significant and not second.significant and first.p == second.p
    assert not first._replace(corrected=LEVEL).significant
    assert second.corrected == pytest.approx(min(1, 4 * first.corrected)) and second.level == first.level / 4


def ranking(**shifts: float) -> dict:
    arrays = arrays_of({label: losses_of(shift) for label, shift in shifts.items()})
    labels = list(shifts)
    pairs = [(b, a) for place, a in enumerate(labels) for b in labels[place + 1 :]]
    return ranking_of(judge(arrays, pairs), labels)


def test_methods_that_cannot_be_told_from_the_best_are_named_together():
    found = ranking(lora=0, lora_x2=0.01, reslora=-0.01, loha=2, lokr=4)
    assert found["best"] == ["lora", "lora_x2", "reslora"] and [each["label"] for each in found["worse"]] == [
        "loha",
        "lokr",
    ]
    assert all(each["reference"] in found["best"] for each in found["worse"])
    low, high = found["worse"][0]["interval"]
    assert low < found["worse"][0]["relative"] < high and 1.5 < low < 2 < high < 2.5
    assert found["sentence"].startswith("best: lora, lora_x2, reslora (cannot be told apart); loha is worse than ")
    alone = ranking(lora=0, reslora=-3)
    low, high = percents(*alone["worse"][0]["interval"])
    assert alone["sentence"] == f"best: reslora; lora is worse than reslora by {low} to {high}%"
    base = losses_of(-3).mean()
    assert alone["worse"][0]["relative"] == pytest.approx(100 * (losses_of(0).mean() / base - 1))
    assert ranking_of([], ["lora"]) is None


def test_the_reference_is_lora_of_the_same_rank():
    labels = {"reslora rank 4": 4, "lora rank 4": 4, "lora rank 8": 8, "reslora rank 8": 8, "loha": 2}
    arms = [
        arm(label, 1e-4, seed, rank=rank, test=measured(losses_of(seed + 5 * rank, images=3)[0]))
        for label, rank in labels.items()
        for seed in range(2)
    ]
    chosen = {label: {"learning_rate": 1e-4} for label in labels}
    found = {each["label"]: each["reference"] for each in compare(arms, chosen)[0]}
    expected = {"reslora rank 4": "lora rank 4", "lora rank 8": "lora rank 4", "reslora rank 8": "lora rank 8"}
    assert found == expected | {"loha": "lora rank 4"}


def test_the_reference_has_equal_values_of_the_options_that_both_use():
    """LoRA has no shortcut or scale, OFT no dropout. Variants of the reference are compared with its first one."""
    low, high = {"lora_dropout": 0}, {"lora_dropout": 0.1}
    kinds = {
        "lora 0": low, "lora 0.1": high, "oft": {}, "matched input": low | {"shortcut": "input"},
        "matched block": low | {"shortcut": "block(4)"}, "reslora 0": low | {"shortcut": "block(4)", "scale": "mean"},
        "reslora 0.1": high | {"shortcut": "block(4)", "scale": "mean"},
    }  # fmt: skip
    arms = [
        arm(label, 1e-4, seed, shortcut=kind.get("shortcut"), test=measured(losses_of(seed, images=3)[0]))
        | {"values": {name: value for name, value in kind.items() if name != "shortcut"}}
        for label, kind in kinds.items()
        for seed in range(2)
    ]
    chosen = {label: {"learning_rate": 1e-4} for label in kinds}
    found = {each["label"]: each["reference"] for each in compare(arms, chosen)[0]}
    same = {"oft": "lora 0", "matched input": "lora 0", "matched block": "lora 0", "reslora 0": "lora 0"}
    assert found == same | {"lora 0.1": "lora 0", "reslora 0.1": "lora 0.1"}
    found = {each["label"]: each["reference"] for each in compare(arms, chosen, reference="matched")[0]}
    assert found["reslora 0"] == "matched block" and found["matched block"] == "matched input" == found["lora 0"]
    assert "matched input" not in found


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
    """The time limit was reached before the other rates were tried; they say more than a rate beyond the grid."""
    losses = [[{"50": 0.5 - 0.1 * place}] if place in trained else [] for place in range(3)]
    assert choice(dict(zip((1e-4, 2e-4, 4e-4), losses, strict=True)))["at_end"] == at_end


def test_one_rate_has_no_ends_and_nothing_finite_is_no_choice():
    assert choice({1e-4: [{"50": 0.5}]}) | {"loss": 0} == {
        "learning_rate": 1e-4, "step": 50, "loss": 0, "at_end": None, "next": None,
    }  # fmt: skip
    for losses in ({}, {1e-4: []}, {1e-4: [{}]}, {1e-4: [{"50": None}]}, {1e-4: [{"50": math.nan}]}):
        assert choice(losses) is None


def test_what_not_all_seeds_have_is_not_chosen():
    """A rate with fewer seeds, a step that one seed lacks, and a step with a non-finite loss."""
    seeds = [{"50": 0.5, "100": 0.1, "150": 0.2}, {"50": 0.5, "150": None}]
    found = choice({1e-4: seeds, 2e-4: [{"50": 0.1}]})
    assert (found["learning_rate"], found["step"], found["at_end"]) == (1e-4, 50, "low")
    # The end of what is left, but not of what was tried.
    found = choice({1e-4: seeds, 2e-4: seeds, 5e-5: [{"50": 0.1}]})
    assert (found["learning_rate"], found["at_end"], found["next"]) == (1e-4, None, None)


def test_seeds_that_compare_do_not_choose_but_a_rate_at_which_one_fails_is_out():
    arms = [arm("lora", 1e-4, 0), arm("lora", 2e-4, 0, select_by_step={"50": 0.2})]
    compares = arm("lora", 1e-4, 1, select_by_step={"50": 0.1})
    assert choose([*arms, compares], [0])["lora"]["learning_rate"] == 2e-4
    fails = arm("lora", 2e-4, 1, status="failed")
    assert choose([*arms, fails], [0])["lora"]["learning_rate"] == 1e-4


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
