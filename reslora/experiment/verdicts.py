"""Compare methods by the test losses in an experiment's record, and formulate verdicts and the ranking."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..formatting import is_or_are, pluralize
from .choice import is_chosen
from .record import Arm, Choice, Ranking, TestLosses, Verdict, Worse
from .statistics import (
    Arrays,
    Judged,
    Pair,
    Tests,
    coverage_in_words,
    detectable,
    expected,
    interval_of,
    judge,
    rerun,
)

ALL = "all"
REFERENCE = "lora"
"""The reference method, with which all others are compared."""
LEAST_GROUPS = 6
"""Least number of groups of test images with which methods are compared."""
AVERAGES = 0.2
"""Part of the significance level for averages of checkpoints, if there are any; the methods have the rest."""


class Compared(NamedTuple):
    """The conclusions about the methods of an experiment."""

    verdicts: list[Verdict]
    ranking: Ranking | None
    """The best methods, if all pairs are compared."""
    family: dict[str, list[tuple[str, ...]]]
    """All pairs that were ever compared: `methods`, and `averages` of checkpoints with the method that they average."""


def compare(
    arms: Iterable[Arm],
    chosen: Mapping[str, Choice],
    unit: str = "image",
    reading: int = 1,
    base: TestLosses | None = None,
    reference: str = REFERENCE,
    against: str = ALL,
    before: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> Compared:
    """Return the conclusions from the test losses of arms at the chosen learning rates.

    `reference`: a method, or one variant of a method (`arms.Label`). If the reference method has several variants,
    another method is compared with one of them (`partner_of`), and the other variants of the reference method are
    compared with its first one. An average of a method's checkpoints is compared with that method only. Without the
    reference nothing is compared. `against`: whether the other methods are also compared with each other. Two options
    with two values each are compared as two effects and their interaction. `before`: the `family` of earlier
    evaluations, which stays. `reading`: number of evaluations on the test split. `base`: losses before training.
    Raises `ValueError` if arms were evaluated on different images.
    """
    judged = [arm for arm in arms if arm["test"] and is_chosen(arm, chosen)]
    kinds = {arm["label"]: kind_of(arm) for arm in judged if "average_of" not in arm}
    averages = {arm["label"]: arm["average_of"] for arm in judged if arm.get("average_of") in kinds}
    of_method = dict.fromkeys(arm["label"] for arm in judged if arm["method"] == reference and arm["label"] in kinds)
    known = [reference] if reference in kinds else list(of_method)
    family = {kind: [(*pair,) for pair in (before or {}).get(kind, ())] for kind in ("methods", "averages")}
    if not known or (test := judged[0]["test"]) is None:
        return Compared([], None, family)
    arrays, units = grouped(arrays_of(tested(judged, chosen)), test)
    references = {label: partner_of(label, known, kinds) for label in kinds if label != known[0]}
    effects = effects_of(kinds, arrays) if against == ALL else None
    others = []
    if effects:
        references, arrays = effects[0], {**arrays, **effects[1]}
    elif against == ALL:
        others = [
            (b, a) for a, b in itertools.combinations(kinds, 2) if references.get(a) != b and references.get(b) != a
        ]
    found: dict[str, Tests] = {}
    for kind, pairs in (("averages", [*averages.items()]), ("methods", [*references.items(), *others])):
        family[kind] = list(dict.fromkeys([*family[kind], *((min(pair), max(pair)) for pair in pairs)]))
        part = AVERAGES if kind == "averages" else 1 - AVERAGES if family["averages"] else 1.0
        least = LEAST_GROUPS if test.get("groups") else 2
        found[kind] = judge(arrays, pairs, reading, len(family[kind]), part, least)
    names = {label: f"{label} at {choice['learning_rate']:g}" for label, choice in chosen.items()}
    unit = f"group of {unit}s" if test.get("groups") else unit
    words = Words(unit, names, sorted({arm["seed"] for arm in judged}), units)
    shown = [each for each in [*found["methods"], *found["averages"]] if each[0][:2] not in others]
    ranking = ranking_of(found["methods"], kinds, words) if against == ALL and not effects else None
    return Compared([verdict_of(*each, words, mean_of(base)) for each in shown], ranking, family)


def grouped(arrays: Arrays, test: TestLosses) -> tuple[Arrays, list[str]]:
    """Return the mean losses of each group of images, and the names of the groups; without groups, of each image."""
    if not (groups := test.get("groups")):
        return arrays, test["images"]
    names = list(dict.fromkeys(groups))
    members = [[place for place, group in enumerate(groups) if group == name] for name in names]
    return {label: np.stack([each[:, own].mean(1) for own in members], 1) for label, each in arrays.items()}, names


def effects_of(
    kinds: Mapping[str, Mapping[str, Any]], arrays: Arrays
) -> tuple[dict[str, str], dict[str, np.ndarray]] | None:
    """Return what is compared if two options have two values each: their effects and the interaction; otherwise None.

    The first mapping has the name of the reference for each name, the second one the losses for all names.
    """
    every = {label: {name: str(value) for name, value in kind.items()} for label, kind in kinds.items()}
    values = {
        name: list(dict.fromkeys(kind.get(name) for kind in every.values())) for name in next(iter(every.values()))
    }
    varied = {name: each for name, each in values.items() if len(each) > 1}
    labels = {tuple(kind.get(name) for name in varied): label for label, kind in every.items()}
    if list(map(len, varied.values())) != [2, 2] or not len(kinds) == len(labels) == 4:
        return None
    (one, (a, b)), (two, (c, d)) = varied.items()
    losses = {key: arrays[label] for key, label in labels.items()}
    compared = {
        f"{one}={a}": (losses[a, c] + losses[a, d]) / 2,
        f"{one}={b}": (losses[b, c] + losses[b, d]) / 2,
        f"{two}={c}": (losses[a, c] + losses[b, c]) / 2,
        f"{two}={d}": (losses[a, d] + losses[b, d]) / 2,
        "the sum of both effects": losses[b, c] + losses[a, d] - losses[a, c],
        f"{one}={b} with {two}={d}": losses[b, d],
    }
    order = list(compared)
    return dict(zip(order[1::2], order[::2], strict=True)), compared


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


class Words(NamedTuple):
    """Words of the sentences about a comparison."""

    unit: str = "image"
    """What a test loss belongs to."""
    names: Mapping[str, str] = {}
    """Names of labels, with their learning rates."""
    seeds: Sequence[int] = ()
    units: Sequence[str] = ()
    """Names of the groups or images."""

    def name(self, label: str) -> str:
        """Return the name of a label."""
        return self.names.get(label, label)


def verdict_of(pair: Pair, test: Judged | None, words: Words | None = None, base: float | None = None) -> Verdict:
    """Return a pair's verdict; the test loss before training, `base`, relates it to the improvement by training."""
    mean, percent = pair.mean, 100 / pair.base
    seeds, units = pair.differences.shape
    gain = 0 if base is None else base - pair.base
    found = Verdict(
        label=pair.label, reference=pair.reference, seeds=seeds, images=units, conclusion="cannot tell", sentence="",
        difference=mean, relative=percent * mean, interval=None, rerun=rerun(percent * pair.differences.mean(1)),
        level=None, p=None, p_holm=None, detectable=None, detectable_interval=None, expected=None,
        of_gain=100 * mean / gain if gain > 0 else None,
    )  # fmt: skip
    if test:
        low, high = interval_of(mean, test.spread, test.reading_level)
        found["interval"] = percent * float(low), percent * float(high)
        found["level"], found["p"], found["p_holm"] = test.reading_level, test.p, test.corrected
        found["conclusion"] = "not shown" if not test.significant else "better" if mean < 0 else "worse"
        if seeds > 2:  # with two seeds the estimate would vary by a factor of ten
            found["detectable"], *ends = (percent * each for each in detectable(test.spread, test.level))
            found["detectable_interval"] = ends[0], ends[1]
        if test.significant:
            found["expected"] = percent * expected(mean, test.spread, test.level)
    found["sentence"] = sentence_of(found, pair, test, words or Words())
    return found


def sentence_of(verdict: Verdict, pair: Pair, test: Judged | None, words: Words) -> str:
    """Return the verdict as a sentence."""
    label, reference, relative = words.name(pair.label), words.name(pair.reference), verdict["relative"]
    towards = "lower" if relative < 0 else "higher"
    if test is None:
        few = "one seed" if verdict["seeds"] == 1 else f"{pluralize(verdict['images'], f'test {words.unit}')}"
        (size,) = percents(relative)
        sentence = f"{few} cannot tell {label} from {reference}: test loss {size}% {towards}, which may be chance"
    elif not pair.differences.any():
        sentence = f"{label} and {reference} have the same test losses"
    elif not test.significant:
        sentence = f"no significant difference shown between {label} and {reference} ({mde_in_words(verdict)})"
        if test.decides:
            seed, unit = pair.outlier
            which = f"seed {words.seeds[seed]}" if test.decides == "seed" else f"{words.unit} {words.units[unit]}"
            sentence += f"; {which} decides: tests with and without ranks or skewness disagree"
    else:
        size, least, most = percents(relative, *sorted(map(abs, verdict["interval"] or ())))
        (further,), gain = percents(verdict["expected"] or 0), verdict["of_gain"]
        part = f", {percents(gain)[0]}% of what training gains" if gain is not None else ""
        sentence = (
            f"{label} is {verdict['conclusion']} than {reference}: test loss {size}% {towards} "
            f"({coverage_in_words(test.reading_level)} interval {least} to {most}%){part}; expect about {further}%"
        )
    if missing := int((~pair.has).sum()):
        sentence += f"; {missing} of {missing + verdict['seeds']} seeds {is_or_are(missing)} missing"
    return sentence


def mde_in_words(verdict: Verdict) -> str:
    """Return a verdict's minimum detectable effect with its interval."""
    if verdict["detectable"] is None or verdict["detectable_interval"] is None:
        return "minimum detectable effect not known with two seeds"
    about, least, most = percents(verdict["detectable"], *verdict["detectable_interval"])
    return f"minimum detectable effect about {about}% ({least} to {most}%)"


def ranking_of(tests: Tests, labels: Iterable[str], words: Words | None = None) -> Ranking | None:
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
    return Ranking(best=best, worse=worse, sentence=ranking_in_words(best, worse, words or Words()))


def order_of(label: str, judged: Judged, best: Sequence[str]) -> tuple[bool, bool, float]:
    """Return the sort key of a pair in which `label` is worse than the other method.

    Pairs in which the other one is one of the `best` come first, then the pair with the reference, then low p values.
    """
    pair = judged.pair
    other = pair.reference if label == pair.label else pair.label
    return other not in best, label != pair.label, judged.p


def worse_of(label: str, judged: Judged) -> Worse:
    """Return by how much a method is worse than the other method of a pair, in percent of the other method's loss."""
    pair = judged.pair
    other, base = (pair.reference, pair.base) if label == pair.label else (pair.label, pair.base + pair.mean)
    ends = [abs(float(end)) for end in interval_of(pair.mean, judged.spread, judged.reading_level)]
    least, most = (100 / base * end for end in sorted(ends))
    return Worse(label=label, reference=other, relative=100 / base * abs(pair.mean), interval=(least, most))


def ranking_in_words(best: Sequence[str], worse: Sequence[Worse], words: Words) -> str:
    """Return the ranking as a sentence: the best methods, then each other method and by how much it is worse."""
    sentence = f"best: {', '.join(map(words.name, best))}" + " (not shown to differ)" * (len(best) > 1)
    reference = None
    for each in worse:
        label = words.name(each["label"])
        is_worse = f"; {label} is worse than {words.name(each['reference'])}"
        least, most = percents(*each["interval"])
        sentence += (f", {label}" if each["reference"] == reference else is_worse) + f" by {least} to {most}%"
        reference = each["reference"]
    return sentence


def percents(*values: float) -> list[str]:
    """Format values without their signs, all with the same number of decimal places, from one to four.

    The number is the smallest with which the smallest nonzero value has a nonzero digit, if four are enough.
    """
    smallest = min((abs(value) for value in values if value), default=1)
    places = min(4, max(1, -math.floor(math.log10(smallest))))
    return [f"{abs(value):.{places}f}" for value in values]
