"""Simulate experiments to measure how often they claim a difference: without any, and with one of the size of the MDE.

Losses are y[label, seed, image]: the sum of effects of the seed, of the image, and of both together, independent
between labels. Every label but the first is compared with the first. `claims` is the fraction of experiments without
any difference that claim one, for each test: the experiment's own (Banerjee), a Student's t with Satterthwaite's
degrees of freedom for the same variance, a t-test over seeds, and a bootstrap over seeds and images. Several
comparisons are corrected by Holm's method, whose first step decides whether there is any claim. `found` is the fraction
of experiments that find a difference of the size of the minimum detectable effect (MDE): of the one at the true
variances, and of the median of the estimated ones.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np
from measured import keep
from scipy import special

from reslora.experiment.statistics import LEVEL, Spread, detectable, half_width, spread_of

SEEDS, IMAGES, COMPARISONS = (2, 3, 5, 8), (10, 40), (1, 4)
VARIANCES = ((0, 0, 1), (0.01, 0.1, 1), (0.1, 0.1, 1), (1, 0.1, 1), (0.1, 1, 1), (1, 1, 1), (0.3, 0.3, 0.1))
"""Of a seed, of an image, and of both together."""
RESAMPLES = 400
ESTIMATED = 200
"""The number of experiments whose estimated MDE is computed."""


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal values."""
    return random.standard_normal(shape)


def skewed(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return exponential values, shifted to mean 0; their variance is 1, and a few images and seeds are outliers."""
    return random.exponential(size=shape) - 1


def differences(random: np.random.Generator, draw, comparisons: int, sizes: tuple, variances: tuple) -> np.ndarray:
    """Return differences without any true effect: comparisons x experiments x seeds x images."""
    experiments, seeds, images = sizes
    shapes = (seeds, 1), (1, images), (seeds, images)
    losses = sum(
        np.sqrt(variance) * draw(random, (comparisons + 1, experiments, *shape))
        for variance, shape in zip(variances, shapes, strict=True)
    )
    return losses[1:] - losses[:1]


# -- tests: whether each of ... x seeds x images claims a difference at a level ----------------------------------------


def ours(found: np.ndarray, level: float) -> np.ndarray:
    """Return whether the experiment's own test claims a difference."""
    return np.abs(found.mean((-2, -1))) > half_width(spread_of(found), level)


def satterthwaite(found: np.ndarray, level: float) -> np.ndarray:
    """Return whether Student's t with Satterthwaite's degrees of freedom claims a difference."""
    (by_seed, by_image, rest), degrees = spread_of(found)
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


# -- the simulation ----------------------------------------------------------------------------------------------------


def simulate(experiments: int, draw, comparisons: int) -> list[dict]:
    """Return a row for each number of seeds and images and each set of variances."""
    rows = []
    for number, (seeds, images, variances) in enumerate(product(SEEDS, IMAGES, VARIANCES)):
        random = np.random.default_rng([number, comparisons])
        found = differences(random, draw, comparisons, (experiments, seeds, images), variances)
        claims = {name: float(way(found, LEVEL / comparisons).any(0).mean()) for name, way in WAYS.items()}
        row = {"seeds": seeds, "images": images, "variances": variances, "claims": claims}
        rows.append(row | {"found": power(found[0], variances, LEVEL / comparisons)})
        print(comparisons, row, flush=True)
    return rows


def power(found: np.ndarray, variances: tuple, level: float) -> dict:
    """Return the fraction of experiments that find a difference of the size of the MDE."""
    seeds, images = found.shape[-2:]
    of_seeds, of_images, rest = 2 * np.array(variances)  # a difference has the variance of both labels
    spread = spread_of(found)
    true = Spread(np.array([rest + images * of_seeds, rest + seeds * of_images, rest]), spread.degrees)
    known = detectable_of(true, level)
    estimates = [detectable(Spread(spread.squares[:, i], spread.degrees), level) for i in range(ESTIMATED)]
    middle = float(np.median(estimates))
    shares = {name: float(ours(found + size, level).mean()) for name, size in (("known", known), ("middle", middle))}
    return shares | {"quartiles_over_known": list(np.quantile(np.array(estimates) / known, (0.25, 0.5, 0.75)))}


def detectable_of(true: Spread, level: float) -> float:
    """Return `detectable` for known expected mean squares; it takes its arguments for medians."""
    return detectable(Spread(true.squares * special.chdtri(true.degrees, 0.5) / true.degrees, true.degrees), level)


def main() -> None:
    """Run all simulations, and write benchmarks/results/experiment/statistics.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000, help="simulated for each row")
    experiments = parser.parse_args().experiments
    figures: dict = {"experiments": experiments, "level": LEVEL}
    for name, draw in (("normal", normal), ("skewed", skewed)):
        figures[name] = {str(number): simulate(experiments, draw, number) for number in COMPARISONS}
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
    for name, ranges in figures["range_of_claims"].items():
        print(name, {way: f"{low:.1%} to {high:.1%}" for way, (low, high) in ranges.items()})
    keep("experiment/statistics", figures)


if __name__ == "__main__":
    main()
