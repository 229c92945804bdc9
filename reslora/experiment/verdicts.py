"""Compare methods by the test losses in an experiment's record, and formulate verdicts and the ranking."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..formatting import is_or_are, pluralize
from .choice import is_chosen
from .record import Arm, Choice, Ranking, TestLosses, Verdict, Worse
from .statistics import LEVEL, Arrays, Comparison, detectable, expected, follow, judge, rerun

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
    family: dict[str, list]
    """All pairs that were ever compared: `methods`, and `averages` of checkpoints with the method that they average."""
    alike: bool = False
    """Whether methods differ by similar amounts on images that were taken one after the other."""


def compare(
    arms: Iterable[Arm],
    chosen: Mapping[str, Choice],
    unit: str = "image",
    reading: int = 1,
    base: TestLosses | None = None,
    reference: str = REFERENCE,
    against: str = ALL,
    before: dict[str, list] | None = None,
) -> Compared:
    """Return the conclusions from the test losses of arms at the chosen learning rates.

    `reference`: a method, or one variant of a method (`arms.Label`). If the reference method has several variants, each
    other method is compared with one of these (`partner_of`), and the reference method's other variants with its first
    one. An average of a method's checkpoints is compared with that method only. Without the reference nothing is
    compared. `against`: whether the methods other than the reference are also compared with each other. Two options
    with two values each are compared as two effects and their interaction. `before`: the `family` of earlier
    evaluations, whose pairs stay in the family. `reading`: number of evaluations on the
    test split. `base`: losses before training. Raises `ValueError` if arms were evaluated on different images.
    """
    judged = [arm for arm in arms if arm["test"] and is_chosen(arm, chosen)]
    kinds = {arm["label"]: kind_of(arm) for arm in judged if "average_of" not in arm}
    averages = {arm["label"]: arm["average_of"] for arm in judged if arm.get("average_of") in kinds}
    of_method = dict.fromkeys(arm["label"] for arm in judged if arm["method"] == reference and arm["label"] in kinds)
    known = [reference] if reference in kinds else list(of_method)
    family = before or {}
    if not known or (test := judged[0]["test"]) is None:
        return Compared([], None, family)
    losses = tested(judged, chosen)
    references = {label: partner_of(label, known, kinds) for label in kinds if label != known[0]}
    if against == ALL and (crossed := crossed_of(kinds, losses)):
        references, losses, against = crossed[0], losses | crossed[1], "crossed"
    names = {label: f"{label} at {choice['learning_rate']:g}" for label, choice in chosen.items()}
    seeds = sorted({arm["seed"] for arm in judged})
    words = Words(unit, names, seeds, test["images"], test.get("groups") or (), mean_of(base))
    found = conclude(losses, references, averages, against, words, reading, family)
    order = test.get("order")
    pairs = [] if order is None else [losses[a] - losses[b] for a, b in references.items()]
    return found._replace(alike=any(follow(pair[:, order]) < LEVEL / len(pairs) for pair in pairs))


def conclude(
    losses: Arrays,
    references: Mapping[str, str],
    averages: Mapping[str, str],
    against: str,
    words: "Words",
    reading: int,
    before: dict[str, list],
    fixed_runs: bool = False,
) -> Compared:
    """Return the conclusions from the losses of each label, of shape (seeds, images).

    `references` and `averages`: the label with which a method, or an average of checkpoints, is compared. `fixed_runs`:
    only images are random (`statistics.judge`). The remaining arguments are those of `compare`.
    """
    least = 2
    if words.groups:
        names, losses = by_group(losses, words.groups)
        words, least = words._replace(unit=f"{words.unit} group", units=names), LEAST_GROUPS
    methods = list(references.items())
    if against == ALL:
        labels = dict.fromkeys([*references.values(), *references])
        known = {frozenset(pair) for pair in methods}
        methods += [(b, a) for a, b in itertools.combinations(labels, 2) if frozenset((a, b)) not in known]
    family: dict[str, list] = {}
    found: dict[str, list[Comparison]] = {}
    for kind, pairs in (("averages", [*averages.items()]), ("methods", methods)):
        ever = [*before.get(kind, ()), *map(sorted, pairs)]
        family[kind] = list(dict.fromkeys(tuple(pair) for pair in ever))
        part = AVERAGES if kind == "averages" else 1 - AVERAGES if family["averages"] else 1.0
        found[kind] = judge(losses, pairs, reading, len(family[kind]), part, least, fixed_runs)
    shown = {*references.items(), *averages.items()}
    every = [*found["methods"], *found["averages"]]
    verdicts = [verdict_of(pair, words) for pair in every if (pair.label, pair.reference) in shown]
    return Compared(verdicts, ranking_of(found["methods"], words) if against == ALL else None, family)


def by_group(losses: Arrays, groups: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of groups, and losses of shape (seeds, groups): means of each group's images."""
    names = list(dict.fromkeys(groups))
    members = [np.array(groups) == name for name in names]
    return names, {label: np.stack([each[:, own].mean(1) for own in members], 1) for label, each in losses.items()}


def crossed_of(
    kinds: Mapping[str, Mapping[str, Any]], losses: Arrays
) -> tuple[dict[str, str], dict[str, np.ndarray]] | None:
    """Return what is compared if two options have two values each: their effects and the interaction; otherwise None.

    The first mapping has the name of the reference for each name, the second one the losses for all names.
    """
    names = dict.fromkeys(name for kind in kinds.values() for name in kind)
    texts = [[f"{name}={kind.get(name)}" for kind in kinds.values()] for name in names]
    varied = [each for each in texts if len({*each}) > 1]
    cells = dict(zip(zip(*varied, strict=True), (losses[label] for label in kinds), strict=False))
    values = [[*dict.fromkeys(each)] for each in varied]
    if [*map(len, values)] != [2, 2] or not len(kinds) == len(cells) == 4:
        return None
    first, second = values
    a, b, c, d = (cells[cell] for cell in itertools.product(first, second))
    both, total = f"{first[1]} with {second[1]}", "the sum of both effects"
    effects = [(a + b) / 2, (c + d) / 2, (a + c) / 2, (b + d) / 2, b + c - a, d]
    references = {first[1]: first[0], second[1]: second[0], both: total}
    return references, dict(zip([*first, *second, total, both], effects, strict=True))


def kind_of(arm: Arm) -> dict[str, Any]:
    """Return an arm's rank, shortcut and other values that vary, by name, as far as its method uses them."""
    used = {"shortcut": arm["shortcut"]} if arm.get("shortcut") else {}
    return {"rank": arm["rank"], **used, **arm.get("values", {})}


def partner_of(label: str, references: Sequence[str], kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the reference of a method: the first one with equal values of all options that both use.

    If there is no such variant, or if the method is one of the references, the result is the first reference. `kinds`:
    `kind_of` by name.
    """
    own = {} if label in references else kinds[label]
    equal = (each for each in references if all(own[name] == kinds[each][name] for name in own.keys() & kinds[each]))
    return next(equal, references[0])


def mean_of(test: TestLosses | None) -> float | None:
    """Return the mean test loss; None without losses, or if one of them is not finite."""
    losses = test["losses"] if test else []
    return math.fsum(losses) / len(losses) if losses and None not in losses else None  # type: ignore[arg-type]


def tested(arms: Iterable[Arm], chosen: Mapping[str, Choice]) -> dict[str, np.ndarray]:
    """Return the test losses of each method at its chosen learning rate, of shape (seeds, images).

    A seed that only other methods have is a row of NaN, and a non-finite loss is NaN. Raises `ValueError` if arms
    were evaluated on different images.
    """
    judged = [(arm, arm["test"]) for arm in arms if arm["test"] and is_chosen(arm, chosen)]
    if any(test["images"] != judged[0][1]["images"] for _, test in judged):
        raise ValueError("runs were evaluated on different test images, so they cannot be compared")
    seeds = sorted({arm["seed"] for arm, _ in judged})
    found = {arm["label"]: np.full((len(seeds), len(test["losses"])), math.nan) for arm, test in judged}
    for arm, test in judged:
        found[arm["label"]][seeds.index(arm["seed"])] = np.array(test["losses"], float)  # None becomes NaN
    return found


class Words(NamedTuple):
    """What the sentences about a comparison name, and the loss before training."""

    unit: str = "image"
    """What a test loss belongs to."""
    names: Mapping[str, str] = {}
    """Names of labels, with their learning rates."""
    seeds: Sequence[object] = ()
    units: Sequence[str] = ()
    """Names of the images, or of their groups."""
    groups: Sequence[str] = ()
    """Group of each image; empty without groups."""
    base: float | None = None
    """Test loss before training, which relates a difference to the improvement by training."""

    def name(self, label: str) -> str:
        """Return the name of a label."""
        return self.names.get(label, label)


def verdict_of(pair: Comparison, words: Words) -> Verdict:
    """Return a pair's verdict."""
    mean, percent = pair.mean, 100 / pair.base
    seeds, units = pair.differences.shape
    gain = 0 if words.base is None else words.base - pair.base
    found = Verdict(
        label=pair.label, reference=pair.reference, seeds=seeds, images=units, conclusion="cannot tell", sentence="",
        difference=mean, relative=percent * mean, interval=None,
        rerun=None if pair.fixed_runs else rerun(percent * pair.differences.mean(1)),
        level=None, p=None, p_holm=None, detectable=None, detectable_interval=None, expected=None,
        of_gain=100 * mean / gain if gain > 0 else None,
    )  # fmt: skip
    if effects := pair.effects:
        low, high = pair.interval
        found["interval"] = percent * low, percent * high
        found["level"], found["p"], found["p_holm"] = pair.reading_level, pair.p, pair.corrected
        found["conclusion"] = "not shown" if not pair.significant else "better" if mean < 0 else "worse"
        if seeds > 2 or pair.fixed_runs:  # with two seeds the estimate would vary by a factor of ten
            about, *ends = (
                percent * each for each in detectable(effects.squares, effects.size, pair.level, pair.reading_level)
            )
            found["detectable"], found["detectable_interval"] = about, (ends[0], ends[1])
        if pair.significant:
            found["expected"] = percent * expected(effects, pair.level)
    found["sentence"] = sentence_of(found, pair, words)
    return found


def sentence_of(verdict: Verdict, pair: Comparison, words: Words) -> str:
    """Return the verdict as a sentence."""
    label, reference, size = words.name(pair.label), words.name(pair.reference), percents(verdict["relative"])[0]
    towards = "lower" if verdict["relative"] < 0 else "higher"
    if not pair.effects:
        few = "one seed" if verdict["seeds"] == 1 else pluralize(verdict["images"], f"test {words.unit}")
        sentence = f"{few} cannot tell {label} from {reference}: test loss {size}% {towards}, which may be chance"
    elif not pair.differences.any():
        sentence = f"{label} and {reference} have the same test losses"
    elif not pair.significant:
        known = mde_in_words(verdict) or "not known with two seeds"
        sentence = (
            f"no significant difference shown between {label} and {reference} (minimum detectable effect {known})"
        )
        if pair.corrected < LEVEL and pair.disagrees is not None:
            places = zip(("seed", words.unit), (words.seeds, words.units), pair.farthest, strict=True)
            kind, names, place = list(places)[pair.disagrees]
            sentence += f"; {kind} {names[place]} decides: it is significant by the mean, but not by signed ranks"
    else:
        size, least, most = percents(verdict["relative"], *sorted(map(abs, verdict["interval"] or ())))
        gain = verdict["of_gain"]
        part = f", {percents(gain)[0]}% of what training gains" if gain is not None else ""
        sentence = (
            f"{label} is {verdict['conclusion']} than {reference}: test loss {size}% {towards} "
            f"({coverage_in_words(pair.reading_level)} interval {least} to {most}%){part}; "
            f"expect about {percents(verdict['expected'] or 0)[0]}%"
        )
    if missing := int((~pair.has).sum()):
        sentence += f"; {missing} of {missing + verdict['seeds']} seeds {is_or_are(missing)} missing"
    return sentence


def mde_in_words(verdict: Verdict) -> str:
    """Return a verdict's minimum detectable effect with its interval, as text; empty if it is not known."""
    about, *ends = percents(verdict["detectable"] or 0, *verdict.get("detectable_interval") or ())
    between = f" ({' to '.join(ends)}%)" if ends else ""
    return "" if verdict["detectable"] is None else f"about {about}%{between}"


def coverage_in_words(level: float) -> str:
    """Return the coverage of intervals at a significance level: 97% at the first evaluation, 99.2% at the second."""
    percent = 100 * level
    return f"{100 - percent:.{max(0, -math.floor(math.log10(percent)))}f}%"


def ranking_of(pairs: Sequence[Comparison], words: Words) -> Ranking | None:
    """Return the methods that do not differ significantly from the best one, and by how much the others are worse.

    A method is worse if it is significantly worse than one of the best methods or, if it is in no pair with them, than
    the other method of its pair with the lowest p value. None if no pair is tested.
    """
    tested = [pair for pair in pairs if pair.effects]
    behind: dict[str, list[tuple[str, Comparison]]] = {}
    for pair in sorted(tested, key=lambda each: each.p):
        if pair.significant:
            ahead, label = (pair.label, pair.reference)[:: 1 if pair.mean < 0 else -1]
            behind.setdefault(label, []).append((ahead, pair))
    labels = dict.fromkeys(name for pair in tested for name in (pair.reference, pair.label))
    if not (best := [label for label in labels if label not in behind]):
        return None
    worse, sentence = [], f"best: {', '.join(map(words.name, best))}" + " (not shown to differ)" * (len(best) > 1)
    for label, found in behind.items():
        ahead, pair = min(found, key=lambda each: each[0] not in best)  # of equal ones the first, with the lowest p
        percent = 100 / (pair.base + (pair.mean if ahead == pair.label else 0))
        low, high = sorted(percent * abs(end) for end in pair.interval)
        worse.append(Worse(label=label, reference=ahead, relative=percent * abs(pair.mean), interval=(low, high)))
    worse.sort(key=lambda each: each["relative"])
    for each in worse:
        least, most = percents(*each["interval"])
        sentence += f"; {words.name(each['label'])} is worse than {words.name(each['reference'])} by {least} to {most}%"
    return Ranking(best=best, worse=worse, sentence=sentence)


def percents(*values: float) -> list[str]:
    """Format values without their signs, all with the same number of decimal places, from one to four.

    The number of decimal places is the smallest with which the smallest nonzero value has a nonzero digit, if four are
    enough.
    """
    smallest = min((abs(value) for value in values if value), default=1)
    places = min(4, max(1, -math.floor(math.log10(smallest))))
    return [f"{abs(value):.{places}f}" for value in values]
