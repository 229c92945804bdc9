"""Choose each method's learning rate and checkpoint by the losses on the selection split."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .record import ENDED_AS, Arm, Choice

LARGEST_STEP = 10
"""Largest ratio from the best learning rate to the next one to try, if the adjacent one has no finite loss."""


def is_chosen(arm: Arm, chosen: Mapping[str, Choice]) -> bool:
    """Return whether an arm was trained at its method's chosen learning rate."""
    label = arm["label"]
    return label in chosen and arm["learning_rate"] == chosen[label]["learning_rate"]


def choose(arms: Iterable[Arm], seeds: Iterable[int] | None = None) -> dict[str, Choice]:
    """Return each method's learning rate and checkpoint with the lowest mean loss on the selection split over seeds.

    The means are over the ended arms with these `seeds` (default: all). A learning rate is not chosen if an arm with
    any seed failed or was stopped early there, or if fewer seeds have ended there than elsewhere. Checkpoints with a
    non-finite loss are left out. A method without a remaining checkpoint is not in the result.
    """
    arms, losses = list(arms), dict[str, dict[float, list[Mapping[str, float | None]]]]()
    failed = {(arm["label"], arm["learning_rate"]) for arm in arms if arm["status"] == "failed"}
    for arm in arms:
        if seeds is None or arm["seed"] in seeds:
            label, rate = arm["label"], arm["learning_rate"]
            found = losses.setdefault(label, {}).setdefault(rate, [])
            if arm["status"] in ENDED_AS:
                usable = arm["status"] == "finished" and (label, rate) not in failed
                found.append(arm["select_by_step"] if usable else {})
    choices = {label: choice(by_rate) for label, by_rate in losses.items()}
    return {label: found for label, found in choices.items() if found}


def choice(losses: Mapping[float, Sequence[Mapping[str, float | None]]]) -> Choice | None:
    """Return the choice of one method. `losses`: by learning rate, the `select_by_step` of each seed that has ended.

    None if no loss is finite. Learning rates with fewer seeds than others are left out.

    `at_end` and `next` are set if the best learning rate is the lowest or the highest key of `losses`, and an arm at
    the learning rate next to it has ended. `next` continues the series by the ratio of these two. The ratio is at most
    LARGEST_STEP if no loss at the neighboring learning rate is finite, because the ratio may be far too high.
    """
    most = max(map(len, losses.values()), default=0)
    tried = sorted(rate for rate, seeds in losses.items() if len(seeds) == most > 0)
    means = {
        (rate, int(step)): mean
        for rate in tried
        for step in set(losses[rate][0]).intersection(*losses[rate])
        if math.isfinite(mean := float(np.mean(np.array([seed[step] for seed in losses[rate]], float))))
    }
    if not means:
        return None
    best, at = min(means, key=lambda key: (means[key], key))
    found = Choice(learning_rate=best, step=at, loss=means[best, at], at_end=None, next=None)
    rates = sorted(losses)
    neighbour = {rates[0]: rates[1], rates[-1]: rates[-2]}.get(best) if len(rates) > 1 else None
    if neighbour and losses[neighbour]:
        found["at_end"] = "low" if best == rates[0] else "high"
        ratio = best / neighbour
        if neighbour in {*tried} - {rate for rate, _ in means}:
            ratio = min(max(ratio, 1 / LARGEST_STEP), LARGEST_STEP)
        found["next"] = float(f"{best * ratio:.3g}")  # as in the names of directories
    return found
