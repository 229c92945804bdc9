"""Verdicts from an experiment's record, and their sentences."""

import math

import numpy as np
import pytest

from reslora.experiment.statistics import effects_of, judge, level_of, rerun
from reslora.experiment.verdicts import Words, compare, coverage_in_words, percents, ranking_of, verdict_of


def losses_of(shift: float, noise: float = 0.001, seeds: int = 3, images: int = 12) -> np.ndarray:
    """Return losses of 0.5 on average, with harder and easier images, and `shift` percent more."""
    random = np.random.default_rng(round(1000 * shift) + 10_000)
    images = np.linspace(0.3, 0.7, images)
    return images * (1 + shift / 100) + noise * random.standard_normal((seeds, len(images)))


def verdicts(losses: dict, references: dict) -> list[dict]:
    words = Words(seeds=range(9), units=[f"image {i}" for i in range(40)])
    return [verdict_of(pair, words) for pair in judge(losses, references.items())]


def verdict(reference: np.ndarray, ours: np.ndarray) -> dict:
    (found,) = verdicts({"lora": reference, "reslora": ours}, {"reslora": "lora"})
    return found


def test_a_better_and_a_worse_method():
    found = verdict(losses_of(0), losses_of(-1.2))
    low, high = found["interval"]
    assert found["conclusion"] == "better" and low < found["relative"] < high < 0 and found["p_holm"] < 0.05
    assert found["relative"] == pytest.approx(100 * found["difference"] / losses_of(0).mean())
    difference = losses_of(-1.2) - losses_of(0)
    ends = effects_of(difference).interval(level_of(1))
    assert (low, high) == pytest.approx(tuple(100 * end / losses_of(0).mean() for end in ends))
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
    size, least, most = percents(found["detectable"], *found["detectable_interval"])
    assert found["conclusion"] == "not shown" and float(least) <= float(size) <= float(most)
    words = "no significant difference shown between reslora and lora "
    words += f"(minimum detectable effect about {size}% ({least} to {most}%))"
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
    assert found["sentence"].endswith("% lower, which may be chance") and found["conclusion"] == "cannot tell"
    found = verdict(losses_of(0)[:, :1], losses_of(-1.2)[:, :1])
    assert found["sentence"].startswith("1 test image cannot tell") and found["images"] == 1


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
    (found,), ranking, family, _ = compare(arms, chosen)
    alone = verdict(theirs, ours)
    assert found | {"sentence": ""} == alone | {"sentence": ""} and ranking["best"] == ["lora", "reslora"]
    assert found["sentence"].startswith("no significant difference shown between reslora at 0.0002 and lora at 0.0001")
    assert family == {"methods": [("lora", "reslora")], "averages": []}
    assert compare(arms[3:], chosen)[:2] == ([], None) == compare([], {})[:2]
    fewer = compare(arms[1:], chosen).verdicts
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
    (found,) = compare(arms, chosen, base=base).verdicts
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
    arrays = {"lora": theirs, "reslora": ours}
    first, second = (judge(arrays, [("reslora", "lora")], k)[0] for k in (1, 2))
    assert first.significant and not second.significant and first.p == second.p
    assert second.corrected == pytest.approx(min(1, 4 * first.corrected)) and second.level == first.level / 4


def ranking(**shifts: float) -> dict:
    arrays = {label: losses_of(shift) for label, shift in shifts.items()}
    labels = list(shifts)
    pairs = [(b, a) for place, a in enumerate(labels) for b in labels[place + 1 :]]
    return ranking_of(judge(arrays, pairs), Words())


def test_methods_that_cannot_be_told_from_the_best_are_named_together():
    found = ranking(lora=0, lora_x2=0.01, reslora=-0.01, loha=2, lokr=4)
    assert found["best"] == ["lora", "lora_x2", "reslora"] and [each["label"] for each in found["worse"]] == [
        "loha",
        "lokr",
    ]
    assert all(each["reference"] in found["best"] for each in found["worse"])
    low, high = found["worse"][0]["interval"]
    assert low < found["worse"][0]["relative"] < high and 1.5 < low < 2 < high < 2.5
    assert found["sentence"].startswith("best: lora, lora_x2, reslora (not shown to differ); loha is worse than ")
    alone = ranking(lora=0, reslora=-3)
    low, high = percents(*alone["worse"][0]["interval"])
    assert alone["sentence"] == f"best: reslora; lora is worse than reslora by {low} to {high}%"
    base = losses_of(-3).mean()
    assert alone["worse"][0]["relative"] == pytest.approx(100 * (losses_of(0).mean() / base - 1))
    assert ranking_of([], Words()) is None


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


def crossed(both: float, seeds: int = 5) -> tuple[list[dict], dict]:
    """Return runs of two options with two values: the first adds 2%, the second 3%, and `both` more percent."""
    arms = []
    for one, other in ((0, 0), (0, 1), (1, 0), (1, 1)):
        losses = losses_of(2 * one + 3 * other + both * one * other, seeds=seeds)
        label = f"lora dropout={one} cap={other}"
        for seed in range(seeds):
            arms.append(arm(label, 1e-4, seed, test=measured(losses[seed], range(12))))
            arms[-1]["values"] = {"dropout": one, "cap": other}
    return arms, {each["label"]: {"learning_rate": 1e-4} for each in arms}


def test_two_options_are_compared_by_their_effects_and_interaction():
    found, ranking, family, _ = compare(*crossed(-2))
    names = [("dropout=1", "dropout=0"), ("cap=1", "cap=0"), ("dropout=1 with cap=1", "the sum of both effects")]
    assert [(each["label"], each["reference"]) for each in found] == names
    assert [each["conclusion"] for each in found] == ["worse", "worse", "better"] and ranking is None
    assert [each["relative"] for each in found] == pytest.approx([1, 2, -2 / 1.05], abs=0.15)
    assert len(family["methods"]) == 3
    assert compare(*crossed(0)).verdicts[2]["conclusion"] == "not shown"
    arms, chosen = crossed(0)
    some = compare(arms, chosen, against="reference").verdicts
    assert [each["reference"] for each in some] == ["lora dropout=0 cap=0"] * 3
    assert len(compare(arms[:15], chosen).verdicts) == 2  # a variant is missing


def test_what_was_compared_counts_in_every_later_comparison():
    losses = {
        label: losses_of(shift)
        for label, shift in zip(("lora", "reslora", "loha", "lokr"), (0, -0.2, 0, 0.01), strict=True)
    }
    arms = [
        arm(label, 1e-4, seed, test=measured(found[seed], range(12)))
        for label, found in losses.items()
        for seed in range(3)
    ]
    chosen = {label: {"learning_rate": 1e-4} for label in losses}
    first = compare(arms, chosen)
    assert len(first.family["methods"]) == 6
    later = compare(arms[:6], chosen, before=first.family)
    alone = compare(arms[:6], chosen)
    assert later.family == first.family and later.verdicts[0]["p"] == alone.verdicts[0]["p"]
    assert later.verdicts[0]["p_holm"] == pytest.approx(min(1, 6 * alone.verdicts[0]["p_holm"]))


def test_an_average_has_its_own_part_of_the_level_and_its_own_reference():
    arms = [
        arm(label, 1e-4, seed, test=measured(losses_of(shift)[seed], range(12))) | more
        for label, shift, more in (
            ("lora", 0, {}),
            ("reslora", -0.3, {}),
            ("reslora last:3", -0.31, {"average_of": "reslora"}),
        )
        for seed in range(3)
    ]
    chosen = {each["label"]: {"learning_rate": 1e-4} for each in arms}
    found, ranking, family, _ = compare(arms, chosen)
    assert [(each["label"], each["reference"]) for each in found] == [
        ("reslora", "lora"),
        ("reslora last:3", "reslora"),
    ]
    assert family == {"averages": [("reslora", "reslora last:3")], "methods": [("lora", "reslora")]}
    alone = compare(arms[:6], chosen).verdicts[0]
    assert found[0]["p_holm"] == pytest.approx(alone["p_holm"] / 0.8) and "last:3" not in ranking["sentence"]


def test_the_seed_that_decides_is_named():
    theirs = losses_of(0, seeds=8)
    ours = losses_of(-1, seeds=8)
    ours[2] *= 1.15
    sentence = verdict(theirs, ours)["sentence"]
    assert "decides" not in sentence and sentence.startswith("no significant difference shown")
    pair = judge({"a": theirs, "b": ours}, [("b", "a")])[0]
    pair.corrected = 0.01
    if pair.disagrees == 0:
        found = verdict_of(pair, Words(seeds=range(8), units=list("abcdefghijkl")))
        assert found["sentence"].endswith("; seed 2 decides: it is significant by the mean, but not by signed ranks")


def test_images_that_follow_one_another_and_differ_alike_are_noticed():
    random = np.random.default_rng(3)
    drift = np.repeat(random.standard_normal(5), 6)
    for size, alike in ((0.02, True), (0, False)):
        arms = []
        for label, shift in (("lora", 0), ("reslora", 1)):
            for seed in range(3):
                losses = 1 + size * shift * drift + 0.01 * random.standard_normal(30)
                arms.append(arm(label, 1e-4, seed, test=measured(losses, range(30)) | {"order": list(range(30))}))
        chosen = {"lora": {"learning_rate": 1e-4}, "reslora": {"learning_rate": 1e-4}}
        assert compare(arms, chosen).alike == alike
