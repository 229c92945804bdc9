"""How often an experiment's verdicts are wrong: simulations of each rule of `reslora/experiment/statistics.py`.

Losses are y[label, seed, image] = what a seed, an image and both together do to a label, independent between labels.
`python benchmarks/experiment_statistics.py NAME` simulates one of these, and without a name all of them:

claims    how many experiments without a difference claim one, by several ways to judge two methods; several by Holm
spread    the same with all pairs of methods, if the spread of seeds is that of the pair, of all pairs, or moderated;
          and how wide the intervals are. One method may spread more than the others.
readings  the same if seeds are added until a difference is significant
choosing  the same if all seeds choose learning rates, if every fourth one does, and if only the others compare
power     how many experiments find a difference as large as the stated minimum detectable effect
expected  by how much claims are too large, and what is expected in their place
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
from measured import keep
from scipy import special

from reslora.experiment import statistics
from reslora.experiment.arms import choosing_of
from reslora.experiment.statistics import (
    LEVEL,
    Spread,
    counts_of,
    detectable,
    expected,
    half_width,
    level_of,
    moderated,
    spread_of,
)

SEEDS, IMAGES, COMPARISONS = (2, 3, 5, 8), (10, 40), (1, 4)
VARIANCES = ((0, 0, 1), (0.01, 0.1, 1), (0.1, 0.1, 1), (1, 0.1, 1), (0.1, 1, 1), (1, 1, 1), (0.3, 0.3, 0.1))
"""Of a seed, an image, and both together."""
FEW_VARIANCES = ((1, 0, 0.01), (0.3, 0.3, 1), (0.05, 0.3, 1))
LABELS, CHOSEN_BY = (2, 3, 5), (2, 3, 5)
RESAMPLES = 200
ESTIMATED = 200
"""Experiments whose stated sizes are looked at."""


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal values."""
    return random.standard_normal(shape)


def skewed(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return exponential values, shifted to mean 0; their variance is 1, and a few images and seeds are outliers."""
    return random.exponential(size=shape) - 1


def losses_of(
    random: np.random.Generator, sizes: tuple, variances: tuple, spreads: Sequence[float], draw: Callable = normal
) -> np.ndarray:
    """Labels x experiments x seeds x images without a difference; `spreads` multiply each label's seed deviation."""
    experiments, seeds, images = sizes
    of_labels = np.array(spreads)[:, None, None, None]
    parts = zip(variances, ((seeds, 1), (1, images), (seeds, images)), (of_labels, 1, 1), strict=True)
    return sum(np.sqrt(v) * more * draw(random, (len(spreads), experiments, *shape)) for v, shape, more in parts)


# -- ways to judge two methods: whether each of ... x seeds x images claims a difference at a level --------------------


def ours(found: np.ndarray, level: float) -> np.ndarray:
    """Return whether the experiment's own test claims a difference."""
    return np.abs(found.mean((-2, -1))) > half_width(spread_of(found), level)


def satterthwaite(found: np.ndarray, level: float) -> np.ndarray:
    """Return whether a test with Satterthwaite's degrees of freedom for the sum of mean squares claims a difference."""
    (by_seed, by_image, rest), degrees, _ = spread_of(found)
    total, alone = by_seed + by_image - rest, np.maximum(by_seed, by_image)
    parts = [square**2 / df for square, df in zip((by_seed, by_image, rest), degrees, strict=True)]
    of_one = np.where(by_seed > by_image, degrees[0], degrees[1])
    freedom = np.where(total > alone, total**2 / sum(parts), of_one)
    error = np.sqrt(np.maximum(total, alone) / found[0, 0].size)
    return np.abs(found.mean((-2, -1))) > error * -special.stdtrit(freedom, level / 2)


def t_over_seeds(found: np.ndarray, level: float) -> np.ndarray:
    """Return whether a t-test over the seeds' means claims a difference."""
    means = found.mean(-1)
    error = means.std(-1, ddof=1) / np.sqrt(means.shape[-1])
    return np.abs(means.mean(-1)) > error * -special.stdtrit(means.shape[-1] - 1, level / 2)


def bootstrap(found: np.ndarray, level: float) -> np.ndarray:
    """Return whether a bootstrap over seeds and images claims a difference."""
    random, (seeds, images) = np.random.default_rng(0), found.shape[-2:]
    by_seed = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    by_image = random.multinomial(images, np.full(images, 1 / images), RESAMPLES) / images
    means = np.einsum("...bi,bi->...b", by_seed @ found, by_image)
    low, high = np.quantile(means, (level / 2, 1 - level / 2), axis=-1)
    return (low > 0) | (high < 0)


WAYS = {"ours": ours, "satterthwaite": satterthwaite, "t over seeds": t_over_seeds, "bootstrap": bootstrap}


def claims(experiments: int) -> dict:
    """Every way at 5%, for each number of seeds, images and comparisons with one reference, and each variance."""
    figures: dict = {}
    settings = itertools.product((normal, skewed), COMPARISONS, SEEDS, IMAGES, VARIANCES)
    for number, (draw, comparisons, seeds, images, variances) in enumerate(settings):
        random = np.random.default_rng([number, comparisons])
        losses = losses_of(random, (experiments, seeds, images), variances, [1] * (comparisons + 1), draw)
        found = {
            name: float(way(losses[1:] - losses[:1], LEVEL / comparisons).any(0).mean()) for name, way in WAYS.items()
        }
        row = {"seeds": seeds, "images": images, "variances": variances, "claims": found}
        figures.setdefault(draw.__name__, {}).setdefault(str(comparisons), []).append(row)
    figures["range_of_claims"] = {
        f"{name}, {number} compared, {'2 seeds' if two else '3 to 8 seeds'}": {
            way: [min(shares), max(shares)]
            for way in WAYS
            for shares in [[row["claims"][way] for row in rows if (row["seeds"] == 2) == two]]
        }
        for name in ("normal", "skewed")
        for number, rows in figures[name].items()
        for two in (True, False)
    }
    return figures


# -- all pairs of methods ----------------------------------------------------------------------------------------------


class Pairs:
    """All pairs of labels in many experiments: pairs x experiments."""

    def __init__(self, losses: np.ndarray, how: str = "moderated") -> None:
        labels = len(losses)
        self.names = list(itertools.combinations(range(labels), 2))
        self.counts = counts_of(len(self.names), labels)
        differences = [losses[other] - losses[one] for one, other in self.names]
        self.means = np.array([each.mean((-2, -1)) for each in differences])
        own = [spread_of(each) for each in differences]
        shared = np.mean([spread.squares[0] for spread in own], 0)
        more = {"own": 0.0, "pooled": np.inf, "moderated": statistics.PRIOR}[how]
        with mock.patch.object(statistics, "PRIOR", more):
            self.spreads = [moderated(spread, shared, labels) for spread in own]

    def halves(self, level: float) -> np.ndarray:
        """Half the width of every interval."""
        return np.array([half_width(spread, level) for spread in self.spreads])

    def claims(self, level: float) -> np.ndarray:
        """Which experiments claim any difference: Holm's first step decides."""
        return (np.abs(self.means) > self.halves(level / self.counts[0])).any(0)


def spread(experiments: int) -> dict:
    """Claims of a reading, and widths, where all methods spread alike and where the last one spreads more."""
    rows, ways = [], ("own", "pooled", "moderated")
    for labels, seeds, variances, times in itertools.product((3, 4, 5), SEEDS[:3], FEW_VARIANCES[:2], (1, 3, 10)):
        random = np.random.default_rng(labels)
        losses = losses_of(random, (experiments, seeds, 10), variances, [1] * (labels - 1) + [times])
        found = {how: Pairs(losses, how) for how in ways}
        halves = {how: pairs.halves(level_of(1)) for how, pairs in found.items()}
        row = {"labels": labels, "seeds": seeds, "variances": variances, "times": times}
        row["claims"] = {how: float(pairs.claims(level_of(1)).mean()) for how, pairs in found.items()}
        row["half_width_over_pooled"] = {how: float(np.median(halves[how][0] / halves["pooled"][0])) for how in ways}
        row["covered"] = {how: float((np.abs(found[how].means) <= halves[how]).mean()) for how in ways}
        rows.append(row)
    worst = {
        f"one spreads {times} times as much": {
            how: max(row["claims"][how] for row in rows if row["times"] == times) for how in ways
        }
        for times in (1, 3, 10)
    }
    return {"most_claims": worst, "rows": rows}


def readings(experiments: int) -> dict:
    """Claims of any reading, where seeds are added until there is one."""
    rules = {
        "no correction": lambda reading: LEVEL,
        "ours": level_of,
    }
    rows = []
    plans = ((3, 5), (2, 3, 4, 5, 6, 7, 8), (3, 5, 8, 12, 16))
    for labels, plan, variances in itertools.product(LABELS, plans, FEW_VARIANCES):
        random = np.random.default_rng(labels)
        losses = losses_of(random, (experiments, plan[-1], 20), variances, [1] * labels)
        looks = [Pairs(losses[:, :, :seeds]) for seeds in plan]
        found = {
            name: float(np.any([pairs.claims(rule(k)) for k, pairs in enumerate(looks, 1)], 0).mean())
            for name, rule in rules.items()
        }
        rows.append({"labels": labels, "readings_at_seeds": plan, "variances": variances, "claims": found})
    return {"most_claims": {name: max(row["claims"][name] for row in rows) for name in rules}, "rows": rows}


def choosing(experiments: int) -> dict:
    """Claims if each method takes the best of five equal learning rates, and the last one spreads as much or more.

    All seeds choose and compare; every fourth chooses and all compare, which is ours; or the others alone compare.
    """
    rows, rates = [], 5
    settings = itertools.product(LABELS, CHOSEN_BY, (1, 3), ((0, 0), (0, 1), (0.5, 1)))
    for labels, seeds, times, (shared, noise) in settings:
        random = np.random.default_rng([labels, seeds])
        spreads = np.array([1] * (labels - 1) + [times])[:, None, None, None]
        alike, own = (normal(random, (labels, experiments, number, seeds)) for number in (1, rates))
        of_seeds = spreads * (np.sqrt(shared) * alike + np.sqrt(1 - shared) * own)  # experiments x rates x seeds
        select = of_seeds + noise * normal(random, of_seeds.shape)  # which the select images add
        every, choose = list(range(seeds)), choosing_of(range(seeds), rates)
        ways = {
            "all": (every, every),
            "ours": (choose, every),
            "others": (choose, [s for s in every if s not in choose]),
        }
        row = {"labels": labels, "seeds": seeds, "times": times, "shared_by_rates": shared, "select_noise": noise}
        row["claims"] = {}
        for name, (by, among) in ways.items():
            if len(among) > 1:
                best = select[..., by].mean(-1).argmin(-1)[:, :, None, None]
                found = np.take_along_axis(of_seeds, best, 2)[:, :, 0][..., among]
                images = losses_of(random, (experiments, len(among), 4), (0, 0.02, 0.02), [1] * labels)
                row["claims"][name] = float(Pairs(found[..., None] + images).claims(level_of(1)).mean())
        rows.append(row)
    most = {name: max(row["claims"].get(name, 0) for row in rows) for name in ("all", "ours", "others")}
    return {"most_claims": most, "rows": rows}


# -- sizes -------------------------------------------------------------------------------------------------------------


def power(experiments: int) -> dict:
    """How many new experiments find a difference of the size that an experiment states, and how that size scatters."""
    rows = []
    for labels, seeds, variances in itertools.product(LABELS, SEEDS, FEW_VARIANCES):
        random = np.random.default_rng([labels, seeds])
        stated = Pairs(losses_of(random, (ESTIMATED, seeds, 20), variances, [1] * labels))
        level = level_of(1) / stated.counts[0]  # where nothing is significant
        first = stated.spreads[0]
        sizes = np.array(
            [detectable(Spread(first.squares[:, i], first.degrees, first.number), level) for i in range(ESTIMATED)]
        )
        again = Pairs(losses_of(random, (experiments, seeds, 20), variances, [1] * labels))
        needed = again.halves(level)[0]
        found = [float((again.means[0] + size > needed).mean()) for size in sizes]
        low, middle, high = np.quantile(sizes, (0.05, 0.5, 0.95))
        row = {"labels": labels, "seeds": seeds, "variances": variances, "found": float(np.mean(found))}
        rows.append(row | {"stated_high_over_low": float(high / low), "stated": float(middle)})
    found = [row["found"] for row in rows if row["seeds"] > 2]
    return {"found_from_3_seeds": [min(found), max(found)], "rows": rows}


def expectation(experiments: int) -> dict:
    """By how much significant differences, and what is expected in their place, are larger than the true difference."""
    rows = []
    for labels, seeds, variances, times in itertools.product(LABELS, (3, 5, 8), FEW_VARIANCES, (0.5, 1, 2)):
        random = np.random.default_rng([labels, seeds])
        pairs = Pairs(losses_of(random, (experiments, seeds, 20), variances, [1] * labels))
        level, first = level_of(1) / pairs.counts[0], pairs.spreads[0]
        middle = Spread(np.median(first.squares, 1), first.degrees, first.number)
        true = times * detectable(middle, level)
        means = pairs.means[0] + true
        claimed = np.flatnonzero(means > pairs.halves(level)[0])[:ESTIMATED]
        given = [
            expected(means[i], Spread(first.squares[:, i], first.degrees, first.number), level) / true for i in claimed
        ]
        row = {"labels": labels, "seeds": seeds, "variances": variances, "true_over_detectable": times}
        row["claimed_over_true"] = float(np.mean(means[claimed]) / true)
        rows.append(row | {"expected_over_true": float(np.mean(given))})
    ranges = {
        f"true difference {times:g} x detectable": {
            name: [min(found), max(found)]
            for name in ("claimed_over_true", "expected_over_true")
            for found in [[row[name] for row in rows if row["true_over_detectable"] == times]]
        }
        for times in (0.5, 1, 2)
    }
    return {"ranges": ranges, "rows": rows}


SIMULATIONS = {
    "claims": claims, "spread": spread, "readings": readings, "choosing": choosing, "power": power,
    "expected": expectation,
}  # fmt: skip


def main() -> None:
    """Run the simulations, and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to simulate: all, if none is given")
    parser.add_argument("--experiments", type=int, default=2000, help="simulated for each row")
    args = parser.parse_args()
    for name in args.names or SIMULATIONS:
        command = f"python benchmarks/experiment_statistics.py {name} --experiments {args.experiments}"
        figures = SIMULATIONS[name](args.experiments)
        print(name, {key: value for key, value in figures.items() if key not in ("rows", "normal", "skewed")})
        keep(
            f"experiment/statistics_{name}",
            {"command": command, "experiments": args.experiments, "level": LEVEL} | figures,
        )


if __name__ == "__main__":
    main()
