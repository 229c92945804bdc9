"""Compare at equal training time: the step that each method has reached in the training time of the reference."""

import statistics
from collections.abc import Collection, Iterable

from .record import Arm

TOLERANCE = 0.02
"""Fraction by which a method may exceed the time: the times of two equal runs differ by about as much."""


def seconds_by_step(arms: Iterable[Arm], label: str, seeds: Collection[int]) -> dict[str, float]:
    """Return the training time until each measured step: the median over a method's finished arms with these seeds."""
    own = [arm for arm in arms if arm["label"] == label and arm["seed"] in seeds and arm["status"] == "finished"]
    times = [arm.get("seconds_by_step", {}) for arm in own]
    steps = set(times[0]).intersection(*times) if times else ()
    return {step: statistics.median(found[step] for found in times) for step in sorted(steps, key=int)}


def at_time(arms: Iterable[Arm], seconds: float, seeds: Collection[int]) -> list[Arm]:
    """Return the arms, each with the loss of one step only: the last step that its method reached within `seconds`.

    It is the same step for all arms of a method. An arm has no loss if its method was not measured within that time.
    Unfinished arms are returned unchanged.
    """
    arms, last = list(arms), {}
    for label in {arm["label"] for arm in arms}:
        times = seconds_by_step(arms, label, seeds)
        last[label] = next((step for step in reversed(times) if times[step] <= seconds * (1 + TOLERANCE)), None)
    return [
        {**arm, "select_by_step": {step: loss for step, loss in arm["select_by_step"].items() if step == last[label]}}
        if arm["status"] == "finished"
        else arm
        for arm in arms
        for label in [arm["label"]]
    ]
