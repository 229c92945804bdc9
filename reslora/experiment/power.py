"""The difference that a planned experiment would detect, from the spread of an earlier experiment (--plan)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..formatting import pluralize
from ..io import read_object
from ..runtime.processes import say
from ..training.trackers import absolute
from .record import EXPERIMENT, FORMAT
from .schedule import ArmSchedule
from .statistics import detectable, effects_of, level_of
from .verdicts import ALL, AVERAGES, by_group, tested

LEAST_SEEDS = 3
"""Fewer seeds do not determine a spread."""
MORE_SEEDS = (3, 5, 8, 12, 20)
"""Numbers of seeds for which the detectable difference is printed, too."""
MODELS = ("pretrained_model_name_or_path", "model_name_or_path")
"""Names of the option for the model."""


class Spread(NamedTuple):
    """How much the differences between methods vary in an experiment, in percent of the loss."""

    squares: np.ndarray
    """Mean squares of seeds, units and residuals, as means over all pairs of methods."""
    size: tuple[int, int]
    """Number of seeds and of units: test images or examples, or groups of them."""
    folder: Path


def print_power(schedule: ArmSchedule, model: str, units: int, unit: str, grouped: bool = False) -> None:
    """Print what an experiment of several methods would detect (`power_in_words`)."""
    if len(schedule.grids) > 1 and units > 1:
        say(power_in_words(schedule, model, units, unit, grouped))


def power_in_words(schedule: ArmSchedule, model: str, units: int, unit: str, grouped: bool = False) -> str:
    """Return a line with the minimum detectable effect of an experiment, and of the same one with more seeds.

    The effect is computed from the spread of an experiment on the same model, in the same folder or next to it: the one
    with the most seeds. `units`: number of test images or examples (`unit`) or, if `grouped`, of their groups.
    """
    methods, folder = len(schedule.grids), schedule.folder.absolute()
    found = [spread_of(each, model, grouped) for each in (folder, *sorted(folder.parent.glob("*/")))]
    spreads = [spread for spread in found if spread]
    if not spreads:
        return (
            f"detectable difference: not known, as no experiment on this model in {folder.parent} has {LEAST_SEEDS} "
            "seeds of two methods; run a short one there, with one learning rate, and plan again"
        )
    spread = max(spreads, key=lambda each: each.size)
    pairs = methods * (methods - 1) // 2 if schedule.against == ALL else methods - 1
    part = 1 - AVERAGES if len(schedule.labels) > methods else 1
    level = level_of(1 + read_object(folder / EXPERIMENT).get("readings", 0))
    counts = sorted({max(2, len(schedule.seeds)), *(count for count in MORE_SEEDS if count > len(schedule.seeds))})
    sizes = [detectable(spread.squares, spread.size, part * level / pairs, level, (count, units)) for count in counts]
    (about, least, most), *others = ([f"{size:.2g}" for size in each] for each in sizes)
    more = ", ".join(f"{size}% with {count}" for count, (size, _, _) in zip(counts[1:], others, strict=True))
    what = f"{unit} group" if grouped else unit
    source = f"{pluralize(spread.size[0], 'seed')} and {pluralize(spread.size[1], what)} in {spread.folder}"
    return (
        f"detectable difference (80% power, about {units} test {what}s): about {about}% ({least} to {most}%) with "
        f"{counts[0]} seeds{f', {more}' if more else ''}; by the spread of {source}"
    )


def spread_of(folder: Path, model: str, grouped: bool) -> Spread | None:
    """Return the spread in the experiment in a folder.

    The result is None if no experiment on this model has enough seeds of two methods and, if `grouped`, groups.
    """
    found = read_object(folder / EXPERIMENT)
    if found.get("format") != FORMAT or absolute(model) not in map(found["settings"].get, MODELS):
        return None
    arms = [arm for arm in found["arms"] if arm["test"] and "average_of" not in arm]
    groups = arms[0]["test"].get("groups", []) if arms else []
    losses = tested(arms, found["chosen"])
    if bool(groups) != grouped or len(losses) < 2:
        return None
    values = np.stack([*(by_group(losses, groups)[1] if grouped else losses).values()])
    values = values[:, np.isfinite(values).all((0, 2))]
    _, *size = values.shape
    if size[0] < LEAST_SEEDS or size[1] < 2:
        return None
    one, other = np.triu_indices(len(values), 1)
    squares = effects_of(100 * (values[one] - values[other]) / values.mean()).squares.mean(1)
    return Spread(squares, (size[0], size[1]), folder) if squares.all() else None
