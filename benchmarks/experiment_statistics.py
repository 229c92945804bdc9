"""How often an experiment's verdicts are wrong with data that are not ideal: simulations of its statistics.

Losses are y[label, experiment, seed, image]: what a seed, an image and both together do to a label. The methods are
alike, so every significant difference is wrong, unless a row says otherwise. The tests are those of
`reslora/experiment/statistics.py`, at its level for the first evaluation on the test split.
`python benchmarks/experiment_statistics.py NAME` simulates one of these, and without a name all of them; `table` as the
name prints the table of docs/statistics.md from the stored results:

noisy     the last method is noisier over seeds; also with variances shrunk as limma does
groups    test images come in groups that resemble each other; also if the groups are not known
rerun     twelve methods, then the command again with only the best or the worst of them; also with its own correction
choosing  the methods have true best learning rates, and each choice is noisy; also with a choice for each seed
outliers  a seed goes wrong for the last method
unseen    where the promise does not hold: what happens in few seeds decides, and most experiments do not see it
skewed    the effects on images are skewed
averages  averages of checkpoints are compared with their methods; also as methods among methods
readings  seeds are added until a difference is significant
coverage  how often intervals contain the true difference
power     how many experiments find a difference as large as the stated minimum detectable effect, and its interval
expected  by how much significant differences are too large, and what is expected in their place
files     one run of each label, compared as it is, as reslora-compare does with files: only images are random
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from measured import RESULTS, keep
from scipy import special

from reslora.experiment.arms import choosing_of
from reslora.experiment.statistics import (
    LEVEL,
    Effects,
    detectable,
    effects_of,
    error_of,
    expected,
    level_of,
    rank_interval,
)
from reslora.experiment.verdicts import AVERAGES
from reslora.io import read_object

SEEDS, LABELS, IMAGES = (2, 3, 5, 8), (2, 3, 5), 20
VARIANCES = ((1, 0.1, 1), (0.3, 0.3, 1), (0.05, 1, 0.3))
"""Of a seed, an image, and both together."""
QUIET = 1, 0.05, 0.1
"""Variances with which seeds differ far more than images."""
FIRST = level_of(1)
ESTIMATED = 80
"""Experiments whose stated sizes are looked at."""


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal values."""
    return random.standard_normal(shape)


def exponential(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return exponential values with mean 0 and variance 1."""
    return random.exponential(size=shape) - 1


def lognormal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return lognormal values with mean 0 and variance 1."""
    return (np.exp(random.standard_normal(shape)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def losses_of(
    random: np.random.Generator, sizes: tuple, variances: tuple, spreads: Sequence[float], of_images: Callable = normal
) -> np.ndarray:
    """Labels x experiments x seeds x images without a difference; `spreads` multiply each label's seed deviation.

    The effects of images on the last label are of the distribution `of_images`.
    """
    experiments, seeds, images = sizes
    shape = len(spreads), experiments
    each = np.array(spreads)[:, None, None, None]
    by_image = normal(random, (*shape, 1, images))
    by_image[-1] = of_images(random, by_image[-1].shape)
    by_seed, rest = each * normal(random, (*shape, seeds, 1)), normal(random, (*shape, seeds, images))
    return sum(np.sqrt(v) * part for v, part in zip(variances, (by_seed, by_image, rest), strict=True))


def ends_of(differences: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the interval that has no zero if the difference is significant, by the mean and by ranks.

    The level of the rank test is that of the first evaluation, without correction for the number of pairs.
    """
    ranked = [rank_interval(differences.mean(axis), max(level, FIRST)) for axis in (-1, -2)]
    lows, highs = zip(effects_of(differences).interval(level), *ranked, strict=True)
    return np.minimum.reduce(lows), np.maximum.reduce(highs)


def signs(differences: np.ndarray, level: float) -> np.ndarray:
    """Return -1, 1 or 0 for every experiment: whether the difference is significant at this level, and its sign."""
    low, high = ends_of(differences, level)
    return (low > 0).astype(int) - (high < 0)


def all_pairs(losses: np.ndarray) -> list[np.ndarray]:
    """Return the differences of all pairs of labels."""
    return [losses[other] - losses[one] for one, other in itertools.combinations(range(len(losses)), 2)]


def false_positives(pairs: Sequence[np.ndarray], level: float = FIRST, family: int = 0) -> dict[str, float]:
    """Return the fraction of experiments with a significant difference, and with one in each direction.

    Holm's procedure rejects a hypothesis if and only if it rejects the one with the smallest p value, so its first
    step decides. `family`: number of comparisons, if it differs from the number of pairs.
    """
    found = np.array([signs(pair, level / (family or len(pairs))) for pair in pairs])
    return {
        "any": float((found != 0).any(0).mean()), "lower": float((found < 0).any(0).mean()),
        "higher": float((found > 0).any(0).mean()),
    }  # fmt: skip


def shrunk(pairs: Sequence[np.ndarray], level: float) -> float:
    """Return the fraction of experiments with a significant difference if limma's rule shrinks variances of seeds.

    The prior degrees of freedom are estimated from the data.
    """
    effects = [effects_of(pair) for pair in pairs]
    own, degrees = np.array([each.squares[0] for each in effects]), effects[0].degrees[0]
    logs = np.log(own) - special.digamma(degrees / 2) + np.log(degrees / 2)
    excess = np.maximum(logs.var(0, ddof=1) - special.polygamma(1, degrees / 2), 1e-6)
    half = 0.5 + 1 / excess  # of the prior degrees of freedom, by Newton's method
    for _ in range(20):
        value = special.polygamma(1, half)
        half = half + value * (1 - value / excess) / special.polygamma(2, half)
    shared, prior = np.exp(logs.mean(0) + special.digamma(half) - np.log(half)), 2 * half
    found = []
    for each in effects:
        squares = [(degrees * each.squares[0] + prior * shared) / (degrees + prior), *each.squares[1:]]
        students = [special.stdtrit(df, level / 2) ** 2 for df in (degrees + prior, *each.degrees[1:])]
        width = error_of([t * square for t, square in zip(students, squares, strict=True)], each.number)
        found.append(abs(each.mean) > width)
    return float(np.any(found, 0).mean())


# -- rows of the table -------------------------------------------------------------------------------------------------


def noisy(experiments: int) -> list[dict]:
    """The last method's deviation over seeds is 1 to 30 times that of the others."""
    rows = []
    for labels, seeds, times, variances in itertools.product(LABELS, SEEDS, (1, 3, 10, 30), VARIANCES[:2]):
        random = np.random.default_rng([labels, seeds, times])
        losses = losses_of(random, (experiments, seeds, IMAGES), variances, [1] * (labels - 1) + [times])
        pairs = all_pairs(losses)
        row = {"labels": labels, "seeds": seeds, "times": times, "variances": variances, **false_positives(pairs)}
        if labels > 2:
            row["another"] = shrunk(pairs, FIRST / len(pairs))
        rows.append(row)
    return rows


def groups(experiments: int) -> list[dict]:
    """Eight groups of 4 or 10 images, whose differences have this correlation within a group."""
    rows = []
    for labels, seeds, size, correlation in itertools.product((2, 5), (3, 5, 8), (4, 10), (0.3, 0.8)):
        random = np.random.default_rng([labels, seeds, size])
        losses = losses_of(random, (experiments, seeds, 8 * size), (0.05, 1 - correlation, 0.3), [1] * labels)
        shared = normal(random, (labels, experiments, 1, 8)) * np.sqrt(correlation)
        losses += np.repeat(shared, size, axis=-1)
        known = losses.reshape(*losses.shape[:-1], 8, size).mean(-1)
        row = {"labels": labels, "seeds": seeds, "size": size, "correlation": correlation}
        row |= false_positives(all_pairs(known))
        rows.append(row | {"another": false_positives(all_pairs(losses))["any"]})
    return rows


def rerun(experiments: int) -> list[dict]:
    """After all twelve methods, the best and the worst are compared with the first one only."""
    rows = []
    for seeds, variances in itertools.product(SEEDS[1:], VARIANCES):
        losses = losses_of(np.random.default_rng(seeds), (experiments, seeds, IMAGES), variances, [1] * 12)
        differences = losses[1:] - losses[:1]
        means = differences.mean((-2, -1))
        ends = [differences[end, np.arange(experiments)] for end in (means.argmin(0), means.argmax(0))]
        row = {"seeds": seeds, "variances": variances, **false_positives(ends, family=66)}
        alone = np.array([signs(end, FIRST) for end in ends])
        rows.append(row | {"another": float((alone != 0).any(0).mean())})
    return rows


def choosing(experiments: int) -> list[dict]:
    """The loss is a parabola of the learning rate's logarithm, and each method has another best one.

    A verdict is about the methods at their chosen rates, so a difference of the true losses there is not wrong.
    `best`: how many verdicts were wrong if they were about the methods at their true best rates. Seeds choose as in an
    experiment (one in four), or each seed chooses its own rate, with as many runs in all (`each`).
    """
    rows, rates = [], np.linspace(-1, 1, 3)
    for labels, seeds, curve, noise in itertools.product((2, 5), (4, 8, 16), (0, 0.5, 2), (0.1, 0.5)):
        random = np.random.default_rng([labels, seeds])
        shape = labels, experiments, 3, seeds
        true = curve * (rates - random.uniform(-1, 1, (labels, experiments, 1))) ** 2
        true -= true.min(-1, keepdims=True)
        of_seeds = 0.5 * normal(random, (labels, experiments, 1, seeds)) + 0.5 * normal(random, shape)
        select = true[..., None] + of_seeds + noise * normal(random, shape)
        images = losses_of(random, (experiments, seeds, IMAGES), (0, 0.02, 0.05), [1] * labels)
        choose = choosing_of(range(seeds), 3)

        def chosen(by: np.ndarray, values: np.ndarray) -> np.ndarray:
            """Return the values at the rate with the lowest loss."""
            return np.take_along_axis(values, np.expand_dims(by.argmin(2), 2), 2)[:, :, 0]

        best = select[..., choose].mean(-1, keepdims=True)
        at = chosen(best, true[..., None])
        losses = chosen(np.broadcast_to(best, shape), of_seeds)[..., None] + images
        row = {"labels": labels, "seeds": seeds, "curve": curve, "noise": noise, **false_positives(all_pairs(losses))}
        row["best"] = false_positives(all_pairs(losses + at[..., None]))["any"]
        few = max(2, (2 * len(choose) + seeds) // 3)  # seeds at three rates each, with as many runs
        own = chosen(select[..., :few], (true[..., None] + of_seeds)[..., :few])[..., None] + images[:, :, :few]
        row["each"] = false_positives(all_pairs(own))["any"]
        for name, found in (("power", losses), ("power_each", own)):
            row[name] = float((signs(found[1] - found[0] - 0.7, FIRST) < 0).mean())
        rows.append(row)
    return rows


def outliers(experiments: int) -> list[dict]:
    """One seed in ten is worse for the last method, or better or worse, by 5 or 15 standard deviations of seeds.

    `either`: in either direction, so the methods are alike on average. `worse`: the last method is otherwise like the
    others, so it is truly worse, and only `lower` is wrong.
    """
    rows = []
    settings = itertools.product((2, 5), (3, 5, 8, 12), VARIANCES, ("either", "worse"), (5, 15))
    for labels, seeds, variances, kind, size in settings:
        random = np.random.default_rng([labels, seeds])
        losses = losses_of(random, (experiments, seeds, IMAGES), variances, [1] * labels)
        wrong = (random.random((experiments, seeds, 1)) < 0.1) * size * np.sqrt(variances[0])
        losses[-1] += wrong * (random.choice([-1, 1], wrong.shape) if kind == "either" else 1)
        row = {"labels": labels, "seeds": seeds, "variances": variances, "kind": kind, "deviations": size}
        found = false_positives(all_pairs(losses))
        if kind == "worse":
            found = {"any": found["lower"]}
        rows.append(row | found)
    return rows


def unseen(experiments: int) -> list[dict]:
    """The promise does not hold here: what makes the means equal happens in few seeds, or hardly in those at hand.

    The last method is better, except that one seed in ten is worse by 15 standard deviations, so that the means are
    equal. Or its effects of seeds are exponential or lognormal, and the other method has none.
    """
    rows = []
    settings = itertools.product((*SEEDS, 12), (*VARIANCES, QUIET), ("outliers", "exponential", "lognormal"))
    for seeds, variances, kind in settings:
        random = np.random.default_rng(seeds)
        losses = losses_of(random, (experiments, seeds, IMAGES), variances, [int(kind == "outliers")] * 2)
        shape = experiments, seeds, 1
        if kind == "outliers":
            effects = 15 * ((random.random(shape) < 0.1) - 0.1)
        else:
            effects = {"exponential": exponential, "lognormal": lognormal}[kind](random, shape)
        losses[-1] += effects * np.sqrt(variances[0])
        row = {"seeds": seeds, "variances": variances, "kind": kind}
        rows.append(row | false_positives(all_pairs(losses)))
    return rows


def skewed(experiments: int) -> list[dict]:
    """The effects of images on the last method are exponential or lognormal, and there are none on the others."""
    rows = []
    for labels, seeds, images, draw in itertools.product((2, 5), (3, 5, 8), (10, 20, 40), (exponential, lognormal)):
        for variances in VARIANCES:
            random = np.random.default_rng([labels, seeds, images])
            losses = losses_of(random, (experiments, seeds, images), (variances[0], 0, variances[2]), [1] * labels)
            losses[-1] += np.sqrt(variances[1]) * draw(random, (experiments, 1, images))
            row = {"labels": labels, "seeds": seeds, "images": images, "variances": variances}
            rows.append(row | {"distribution": draw.__name__, **false_positives(all_pairs(losses))})
    return rows


def averages(experiments: int) -> list[dict]:
    """Two averages of each method's checkpoints differ little from it; the power is that of a true difference.

    `alone`: without averages. `another`: as methods among methods, the correction of earlier versions.
    """
    rows = []
    for labels, seeds, variances in itertools.product((2, 3), (3, 5, 8), VARIANCES):
        random = np.random.default_rng([labels, seeds])
        losses = losses_of(random, (experiments, seeds, IMAGES), variances, [1] * labels)
        near = [0.1 * losses_of(random, (experiments, seeds, IMAGES), variances, [1] * labels) for _ in range(2)]
        pairs, own = all_pairs(losses), [each for part in near for each in part]
        found = np.array(
            [signs(each, (1 - AVERAGES) * FIRST / len(pairs)) for each in pairs]
            + [signs(each, AVERAGES * FIRST / len(own)) for each in own]
        )
        row = {"labels": labels, "seeds": seeds, "variances": variances, "any": float((found != 0).any(0).mean())}
        many = 3 * labels * (3 * labels - 1) / 2
        true = detectable_of(pairs[0], FIRST / len(pairs))
        for name, level in (("alone", 1 / len(pairs)), ("power", (1 - AVERAGES) / len(pairs)), ("another", 1 / many)):
            row[name] = float((signs(pairs[0] + true, FIRST * level) > 0).mean())
        rows.append(row)
    return rows


def readings(experiments: int) -> list[dict]:
    """Seeds are added until a difference is significant; another rule gives each evaluation a level of 5%."""
    rows = []
    plans = ((3, 5), (2, 3, 4, 5, 6, 7, 8), (3, 5, 8, 12, 16))
    for labels, plan, variances in itertools.product(LABELS, plans, VARIANCES):
        losses = losses_of(np.random.default_rng(labels), (experiments, plan[-1], IMAGES), variances, [1] * labels)
        row = {"labels": labels, "readings_at_seeds": plan, "variances": variances}
        for name, rule in (("any", level_of), ("another", lambda reading: LEVEL)):
            found = [
                signs(pair, rule(number) / (labels * (labels - 1) / 2))
                for number, seeds in enumerate(plan, 1)
                for pair in all_pairs(losses[:, :, :seeds])
            ]
            row[name] = float((np.array(found) != 0).any(0).mean())
        rows.append(row)
    return rows


def coverage(experiments: int) -> list[dict]:
    """Each pair's interval at the first evaluation, for each kind of data; it should cover 97%."""
    rows = []
    for seeds, variances, times, draw in itertools.product(SEEDS, VARIANCES, (1, 10), (normal, exponential, lognormal)):
        random = np.random.default_rng([seeds, times])
        losses = losses_of(random, (experiments, seeds, IMAGES), variances, [1, times], draw)
        low, high = effects_of(losses[1] - losses[0]).interval(FIRST)
        row = {"seeds": seeds, "variances": variances, "times": times, "distribution": draw.__name__}
        rows.append(row | {"covered": float(((low <= 0) & (high >= 0)).mean())})
    return rows


# -- sizes -------------------------------------------------------------------------------------------------------------


def detectable_of(differences: np.ndarray, level: float) -> float:
    """Return the true minimum detectable effect of simulated experiments without a difference."""
    return float(np.quantile(-ends_of(differences, level)[0], 0.8))


def each_of(effects: Effects, number: int) -> Effects:
    """Return the effects of one of the experiments."""
    return Effects(*(part[number] for part in effects))


def power(experiments: int) -> list[dict]:
    """New experiments with a true difference of the size that an experiment states."""
    rows = []
    for labels, seeds, variances in itertools.product(LABELS, SEEDS[1:], VARIANCES):
        random = np.random.default_rng([labels, seeds])
        level = FIRST / (labels * (labels - 1) / 2)  # where nothing is significant
        first, again = (
            found[1] - found[0]
            for number in (ESTIMATED, experiments)
            for found in [losses_of(random, (number, seeds, IMAGES), variances, [1, 1])]
        )
        effects, low = effects_of(first), ends_of(again, level)[0]
        true = float(np.quantile(-low, 0.8))
        stated = np.array([detectable(effects.squares[:, i], effects.size, level, FIRST) for i in range(ESTIMATED)])
        found = [(low + size > 0).mean() for size in stated[:, 0]]
        row = {"labels": labels, "seeds": seeds, "variances": variances, "power": float(np.mean(found))}
        row["interval_has_truth"] = float(((stated[:, 1] <= true) & (true <= stated[:, 2])).mean())
        rows.append(row | {"stated_over_true": [float(x) for x in np.quantile(stated[:, 0] / true, (0.1, 0.5, 0.9))]})
    return rows


def expectation(experiments: int) -> list[dict]:
    """How much larger significant differences, and what is expected in their place, are than the true difference."""
    rows = []
    for labels, seeds, variances, times in itertools.product(LABELS, (3, 5, 8), VARIANCES, (0.5, 1, 2)):
        random = np.random.default_rng([labels, seeds])
        level = FIRST / (labels * (labels - 1) / 2)
        one, other = losses_of(random, (experiments, seeds, IMAGES), variances, [1, 1])
        true = times * detectable_of(one - other, level)
        found = one - other + true
        effects = effects_of(found)
        claimed = np.flatnonzero(signs(found, level) > 0)[:ESTIMATED]
        each = [expected(each_of(effects, i), level) for i in claimed]
        row = {"labels": labels, "seeds": seeds, "variances": variances, "true_over_detectable": times}
        row["claimed_over_true"] = float(np.mean(effects.mean[claimed]) / true)
        rows.append(row | {"expected_over_true": float(np.mean(each) / true)})
    return rows


def files(experiments: int) -> list[dict]:
    """One run of each label, compared as it is: false positives, and the power at the size that an experiment states.

    The effects of images on the last label are of the named distribution.
    """
    rows = []
    for labels, images, draw in itertools.product((2, 5), (6, 10, 20, 40), (normal, exponential, lognormal)):
        random = np.random.default_rng([labels, images])
        losses = losses_of(random, (experiments, 1, images), (0, 1, 0.3), [1] * labels, draw)
        pairs = [np.repeat(pair, 2, axis=-2) for pair in all_pairs(losses)]  # as `statistics.judge` does
        row = {"labels": labels, "images": images, "distribution": draw.__name__, **false_positives(pairs)}
        if draw is normal:
            level, effects = FIRST / len(pairs), effects_of(pairs[0])
            low = ends_of(pairs[-1], level)[0]
            stated = [detectable(effects.squares[:, i], effects.size, level, FIRST)[0] for i in range(ESTIMATED)]
            row["power"] = float(np.mean([(low + size > 0).mean() for size in stated]))
        rows.append(row)
    return rows


SIMULATIONS = {
    "noisy": noisy, "groups": groups, "rerun": rerun, "choosing": choosing, "outliers": outliers, "skewed": skewed,
    "unseen": unseen, "averages": averages, "readings": readings, "coverage": coverage, "power": power,
    "expected": expectation, "files": files,
}  # fmt: skip
TABLE = {
    "noisy": ("one method is noisier over seeds, up to 30 times", "another", "limma's variances"),
    "groups": ("test images in known groups of 4 or 10", "another", "groups not known"),
    "rerun": ("12 methods, then the best or the worst alone", "another", "correction for one pair"),
    "choosing": ("each method at its own chosen rate", "best", "verdicts about the methods at their best rates"),
    "averages": ("averages of checkpoints", "", ""),
    "outliers": ("one seed in ten goes wrong for one method", "", ""),
    "skewed": ("effects on images are exponential or lognormal", "", ""),
    "readings": ("seeds are added until a difference is significant", "another", "a level of 5% each time"),
    "files": ("one run of each method, compared as it is on new images", "", ""),
    "unseen": ("**does not hold**: seeds of which few decide the mean", "", ""),
}
"""Setting, the column of another rule, and what this rule is, by simulation."""


def table() -> str:
    """Return the stored results as a Markdown table of the highest rates of false positives."""
    lines = ["| setting | NAME | false positives, at most | with another rule |", "|---|---|---|---|"]
    for name, (setting, column, rule) in TABLE.items():
        ranges = read_object(RESULTS / f"experiment/statistics_{name}.json")["ranges"]
        other = f"{100 * ranges[column][1]:.1f}%: {rule}" if column else ""
        lines.append(f"| {setting} | `{name}` | {100 * ranges['any'][1]:.1f}% | {other} |")
    return "\n".join(lines) + "\n"


def ranges_of(rows: Sequence[dict]) -> dict[str, list[float]]:
    """Return the lowest and the highest value of each result."""
    names = {name for row in rows for name, value in row.items() if isinstance(value, float)}
    settings = {"times", "size", "correlation", "curve", "noise", "true_over_detectable"}
    found = {name: [row[name] for row in rows if name in row] for name in sorted(names - settings)}
    return {name: [min(values), max(values)] for name, values in found.items()}


def main() -> None:
    """Run the simulations, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to simulate: all, if none is given")
    parser.add_argument("--experiments", type=int, default=2000, help="simulated for each row")
    args = parser.parse_args()
    if args.names == ["table"]:
        print(table(), end="")
        return
    for name in args.names or SIMULATIONS:
        command = f"python benchmarks/experiment_statistics.py {name} --experiments {args.experiments}"
        rows = SIMULATIONS[name](args.experiments)
        ranges = ranges_of(rows)
        print(name, ranges, flush=True)
        facts = {"command": command, "experiments": args.experiments, "level": FIRST, "ranges": ranges, "rows": rows}
        keep(f"experiment/statistics_{name}", facts)


if __name__ == "__main__":
    main()
