"""How many steps the race of learning rates saves, and how good its choices are: simulations on measured losses.

    python benchmarks/racing.py

The runs of the experiments in `benchmarks/results/why` were trained at every learning rate to the end, and measured two
to four times. For each method and seed with three or more learning rates, the rules of `reslora/experiment/racing.py`
choose from these losses as the race would have seen them. `measured` are the results. `ten_measurements` has the same
runs with ten measurements, interpolated between the measured ones in the logarithm of the step. The part before
the first one is an assumption: it starts at a loss 10% above the highest measured one. The rules and their thresholds
were chosen on the same grids.

A choice is good if its loss on the selection split is at most a quarter of the experiment's minimum detectable effect
above that of the full grid's choice. The effect is the median over the experiment's methods. The result is
`benchmarks/results/experiment/racing.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from measured import RESULTS, keep
from scipy.interpolate import PchipInterpolator

from reslora.experiment.arms import coarse_to_fine
from reslora.experiment.racing import FROM, HIGHER, LOWER, remaining, stopped_at
from reslora.io import read_object

Curves = dict[float, dict[int, float]]
"""Losses on the selection split by learning rate and step."""
MEASUREMENTS = 10
LEAST = 3
"""Number of learning rates from which on a race can leave one out."""


@dataclass(frozen=True)
class Grid:
    """All learning rates of one method and seed, trained to the end."""

    experiment: str
    curves: Curves
    tolerance: float
    """A quarter of the minimum detectable effect, relative to the loss."""


def grids() -> Iterator[Grid]:
    """Yield the grids of all measured experiments that trained them completely."""
    for path in sorted((RESULTS / "why").glob("*.json")):
        record = read_object(path)
        if record["identity"].get("racing"):  # its grids are not complete
            continue
        effects = [verdict["detectable"] for verdict in record["verdicts"] if verdict["detectable"]]
        found: dict[tuple, Curves] = {}
        for arm in record["arms"]:
            if arm["status"] == "finished":
                curve = {int(step): float(loss) for step, loss in arm["select_by_step"].items()}
                found.setdefault((arm["label"], arm["seed"]), {})[arm["learning_rate"]] = curve
        for curves in found.values():
            if len(curves) >= LEAST:
                yield Grid(path.stem, curves, float(np.median(effects)) / 400)


def interpolated(grid: Grid) -> Grid:
    """Return the grid with MEASUREMENTS losses for each run."""
    start = 1.1 * max(max(curve.values()) for curve in grid.curves.values())
    return Grid(grid.experiment, {rate: filled(curve, start) for rate, curve in grid.curves.items()}, grid.tolerance)


def filled(curve: Mapping[int, float], start: float) -> dict[int, float]:
    """Return MEASUREMENTS losses of a run: a monotone interpolation between its measurements."""
    steps, end = sorted(curve), max(curve)
    at = np.log(np.array([0, *steps]) + end / 10)
    line = PchipInterpolator(at, [start, *(curve[step] for step in steps)])
    wanted = [round(end * number / MEASUREMENTS) for number in range(1, MEASUREMENTS + 1)]
    return {step: float(line(np.log(step + end / 10))) for step in wanted}


def race(curves: Curves) -> tuple[float, float]:
    """Return the fraction of the steps that a race trains, and how far its choice is above the full grid's.

    The latter is relative to the full grid's lowest loss.
    """
    rates, losses, trained = sorted(curves), {}, 0
    start, end = coarse_to_fine(rates)[0], max(max(curve) for curve in curves.values())
    while left := remaining(rates, losses, start):
        rate, curve = left[0], curves[left[0]]
        best = min(losses, key=losses.__getitem__, default=None)
        stopped = stopped_at(curve, curves[best], higher=rate > best) if best is not None else None
        losses[rate] = np.inf if stopped else min(curve.values())
        trained += stopped or end
    lowest = min(min(curve.values()) for curve in curves.values())
    return trained / (len(rates) * end), min(losses.values()) / lowest - 1


def summary(found: list[Grid]) -> dict:
    """Return the figures of several grids."""
    results = [race(grid.curves) for grid in found]
    above = np.array([result[1] for result in results])
    good = above <= [grid.tolerance for grid in found]
    return {
        "grids": len(found),
        "steps_used": float(np.mean([result[0] for result in results])),
        "within_a_quarter_of_the_detectable_effect": float(np.mean(good)),
        "within_0.3%": float(np.mean(above <= 0.003)),
        "same_choice": float(np.mean(above == 0)),
        "largest_percent_above": float(100 * above.max()),
    }


def figures(found: list[Grid]) -> dict:
    """Return the figures of all grids, of those with few and with many learning rates, and of each experiment."""
    few = [grid for grid in found if len(grid.curves) < 5]
    many = [grid for grid in found if len(grid.curves) >= 5]
    names = dict.fromkeys(grid.experiment for grid in found)
    each = {name: summary([grid for grid in found if grid.experiment == name]) for name in names}
    return {"all": summary(found), "3 or 4 rates": summary(few), "5 or more rates": summary(many), "experiments": each}


def main() -> None:
    """Simulate, print the main figures, and write all of them."""
    measured = list(grids())
    found = {"measured": figures(measured), "ten_measurements": figures([interpolated(grid) for grid in measured])}
    for name, part in found.items():
        for which in ("all", "3 or 4 rates", "5 or more rates"):
            print(f"{name}, {which}: {part[which]}")
    goal = {"steps_used": 0.5, "within_a_quarter_of_the_detectable_effect": 0.95}
    met = {
        f"{name}, {which}": part[which]["steps_used"] <= goal["steps_used"]
        and part[which]["within_a_quarter_of_the_detectable_effect"] >= 0.95
        for name, part in found.items()
        for which in ("all", "5 or more rates")
    }
    rules = {"higher": HIGHER, "lower": LOWER, "lower_from": FROM}
    facts = {"command": "python benchmarks/racing.py", "rules": rules, "goal": goal, "met": met}
    keep("experiment/racing", facts | found)


if __name__ == "__main__":
    main()
