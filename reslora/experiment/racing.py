"""The race of a method's learning rates: which one is trained next, and when a run is stopped early.

The race starts at the middle learning rate. The neighbors of the best one so far follow, the lower one first, until
both are worse. A run is stopped early at the first measurement at which it is clearly worse than the best finished run
with the same seed at the same step. A lower learning rate is slower at first and may catch up, so it is compared from
half of the steps on, with a larger margin. `benchmarks/results/experiment/racing.json` has simulations
of these rules.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

HIGHER, LOWER = 0.002, 0.01  # how much worse, relative to the best one's loss, stops a higher and a lower learning rate
FROM = 0.5  # fraction of the steps after which a lower learning rate is compared
NEAR = 0.01  # the other choosing seeds train the learning rates whose loss is at most this much above the lowest


def remaining(rates: Sequence[float], losses: Mapping[float, float], start: float) -> list[float]:
    """Return the learning rates that the race may still train, the next one first; empty if it is decided.

    `rates` are in ascending order. `losses`: the lowest loss at each learning rate whose run has ended; infinite if it
    diverged or was stopped early. If the losses at all ended learning rates are infinite, only learning rates below the
    ended ones remain.
    """
    ended = [rate for rate in rates if rate in losses]
    if not ended:
        return [start, *(rate for rate in rates if rate != start)]
    best = min(ended, key=lambda rate: losses[rate])
    place = rates.index(best)
    sides = [rates[:place][::-1], rates[place + 1 :] if math.isfinite(losses[best]) else []]
    return [rate for side in sides for rate in itertools.takewhile(lambda rate: rate not in losses, side)]


def near_best(losses: Mapping[float, float]) -> list[float]:
    """Return the learning rates whose lowest loss is at most NEAR above the lowest of all, the best one first."""
    lowest = min(losses.values(), default=math.inf)
    near = [rate for rate, loss in losses.items() if loss <= lowest * (1 + NEAR) < math.inf]
    return sorted(near, key=losses.__getitem__)


def stopped_at(curve: Mapping[int, float], best: Mapping[int, float], higher: bool) -> int | None:
    """Return the first step at which a run is stopped early; None if it is not stopped.

    `curve` and `best`: losses by step, of the run and of the best finished run. `higher`: whether the run has the
    higher learning rate of the two. A run is not stopped at the last step, or after one of its losses was at most the
    lowest loss of the best run.
    """
    margin, first = (HIGHER, 0) if higher else (LOWER, FROM * max(best))
    lowest, so_far = min(best.values()), math.inf
    for step, loss in sorted(curve.items()):
        so_far = min(so_far, loss)
        compared = first <= step < max(best) and step in best and so_far > lowest
        if compared and loss >= best[step] * (1 + margin):
            return step
    return None
