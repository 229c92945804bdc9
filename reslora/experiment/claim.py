"""Answer a claim that was stated before an experiment: is a method better than its reference by more than a margin?

This is a test of superiority by a margin, as in clinical trials (ICH E9): the claim is confirmed if the confidence
interval of the improvement lies completely above the margin, refuted if it lies completely below, and otherwise open.
The claim is one hypothesis, so the interval is not corrected for other pairs of methods. Like all verdicts, it is
corrected for repeated evaluations on the test split: its coverage is 97% at the first one. If the true improvement
equals the margin, the claim is confirmed with a probability of at most 2.5%, and refuted with a probability of at most
2.5%.
"""

import itertools
from collections.abc import Iterable, Mapping

import numpy as np
from scipy import special

from ..formatting import pluralize
from .record import Answer, Arm, Choice, Stated
from .statistics import (
    POWER,
    Judged,
    Spread,
    arrays_of,
    coverage_in_words,
    half_width,
    judge,
    level_of,
    percents,
    tested,
)

MOST_SEEDS = 100
"""Largest number of further seeds that is advised."""


def answer(
    claim: Stated, arms: Iterable[Arm], chosen: Mapping[str, Choice], reading: int = 1, unit: str = "image"
) -> Answer:
    """Return the answer to a claim from the test losses of arms.

    `reading`: number of this evaluation on the test split, from 1. `unit`: word for what a test loss belongs to.
    """
    label, reference = claim["label"], claim["reference"]
    arrays = arrays_of(tested(arms, chosen))
    if not {label, reference} <= arrays.keys():
        problem = "not both are trained and tested yet"
        return Answer(conclusion="not enough data", more_seeds=None, sentence=f"not enough data: {problem}")
    others = [pair for pair in itertools.combinations(arrays, 2) if set(pair) != {label, reference}]
    found = judge(arrays, [(label, reference), *others], reading)
    pair, test = next(((pair, test) for pair, test in found if pair[:2] == (label, reference)), (None, None))
    if test is None or pair is None:
        seeds = max(0, 2 - (len(pair.differences) if pair else 0))
        more = pluralize(seeds, "seed") if seeds else f"1 test {unit}"
        sentence = f"not enough data: add {more} or more; an interval needs two"
        return Answer(conclusion="not enough data", more_seeds=seeds or None, sentence=sentence)
    percent = 100 / pair.base
    improvement, half = -percent * pair.mean, percent * float(half_width(test.spread, test.reading_level))
    conclusion = decide(improvement, half, claim["margin"])
    needed = more_seeds(abs(pair.mean + claim["margin"] / percent), test, reading) if conclusion == "open" else None
    return Answer(
        conclusion="not enough data" if conclusion == "open" else conclusion,  # type: ignore[typeddict-item]
        more_seeds=needed,
        sentence=sentence_of(
            conclusion, claim, (improvement, improvement - half, improvement + half), test.reading_level, needed, unit
        ),
    )


def decide(improvement: float, half: float, margin: float) -> str:
    """Return `confirmed`, `refuted` or `open` for an improvement, half the width of its interval, and the margin."""
    return "confirmed" if improvement - half > margin else "refuted" if improvement + half < margin else "open"


def more_seeds(distance: float, test: Judged, reading: int) -> int | None:
    """Return about how many more seeds decide a claim with a probability of 80%; None if MOST_SEEDS are too few.

    `distance`: distance of the mean difference of losses from the margin, as a loss. The true difference is assumed to
    be the observed one. More seeds reduce the part of the variance that seeds cause, but not the part that images
    cause.
    """
    seeds, images = test.pair.differences.shape
    by_seed, by_image, rest = test.spread.squares
    own = max(0.0, by_image - rest) / seeds  # variance of an image's true difference
    pooled = test.spread.degrees[0] - (seeds - 1)  # degrees of freedom from other pairs
    quantile = float(special.ndtri(POWER))
    for total in range(seeds + 1, seeds + MOST_SEEDS + 1):
        degrees = np.array([total - 1 + pooled, images - 1, (total - 1) * (images - 1)], float)
        spread = Spread(np.array([by_seed, min(by_image, rest) + total * own, rest]), degrees, total * images)
        if float(half_width(spread, level_of(reading + 1))) + quantile * float(spread.error) <= distance:
            return total - seeds
    return None


def sentence_of(
    conclusion: str, claim: Stated, sizes: tuple[float, float, float], level: float, more: int | None, unit: str
) -> str:
    """Return the answer as a sentence.

    `sizes`: the improvement and the ends of its interval at `level`, in percent. `more`: the number of seeds to add,
    None if the most seeds that may be added would not be enough.
    """
    size, low, high = (("-" if value < 0 else "") + text for value, text in zip(sizes, percents(*sizes), strict=True))
    claimed = f"{claim['label']} is better than {claim['reference']} by more than {claim['margin']:g}%"
    found = f"(improvement {size}%, {coverage_in_words(level)} interval {low} to {high}%)"
    if conclusion != "open":
        return f"{conclusion}: {claimed} {found}"
    advice = f"about {more} more seed{'s' * (more != 1)}"
    if more is None:
        advice = f"even {MOST_SEEDS} more seeds would hardly be enough; use more test {unit}s, or state another margin"
    return f"not enough data: {advice}, for: {claimed} {found}"


def stated_again(before: Iterable[Stated], now: Stated) -> list[Stated]:
    """Return the claims of earlier starts, followed by the present claim `now` if it differs from the last of them."""
    claims = list(before)
    if claims and all(claims[-1].get(name) == now[name] for name in ("label", "reference", "margin", "sha256")):
        return claims
    return [*claims, now]


def changes(claims: Iterable[Stated], total: int) -> list[str]:
    """Return a sentence for each change of the claim after the experiment had begun.

    `claims`: all stated claims, oldest first. `total`: number of arms (runs) of the experiment.
    """
    found = []
    for before, now in itertools.pairwise(claims):
        same = all(before[name] == now[name] for name in ("label", "reference", "margin"))
        was = f"{before['label']} better than {before['reference']} by more than {before['margin']:g}%"
        what = "the file was changed, but not what it claims" if same else f"the claim was changed: it was {was}"
        read = pluralize(now["readings"], "time")
        when = f"{now['ended']} of {total} runs had ended, and the test split was evaluated {read}"
        found.append(f"{what}; {when} (SHA-256 before: {before['sha256'] or 'no file'})")
    return found
