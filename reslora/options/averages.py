"""Averages of checkpoints (--average_checkpoints): how they are written, and the weights of the checkpoints in them."""

import argparse
from dataclasses import dataclass

NOTATION = "ema:DECAY or last:N"


@dataclass(frozen=True)
class Average:
    """A weighted mean of a run's checkpoints."""

    kind: str
    """`ema` or `last`."""
    value: float
    """Decay of `ema`, between 0 and 1; number of checkpoints of `last`."""

    def __str__(self) -> str:
        """Return the average as typed on the command line."""
        return f"{self.kind}:{self.value:g}"

    @property
    def least(self) -> int:
        """The number of checkpoints that the average needs."""
        return 2 if self.kind == "ema" else int(self.value)

    def weights(self, count: int) -> list[float]:
        """Return the weights of `count` checkpoints, oldest first; they sum to 1.

        `last:N`: 1/N for the last N checkpoints, and 0 for the earlier ones. `ema:d`: the weights of an exponential
        moving average over the checkpoints in order, `d^(count - 1 - k) (1 - d) / (1 - d^count)` for checkpoint k from
        0. The denominator is Adam's correction of the bias (Kingma & Ba, 2015): without it, the average would start
        from zero.
        """
        if self.kind == "last":
            used = min(count, self.least)
            return [0.0] * (count - used) + [1 / used] * used
        powers = [self.value**age for age in reversed(range(count))]
        return [power / sum(powers) for power in powers]


def averages(text: str) -> str:
    """Return validated averages in their shortest notation, such as `ema:0.99,last:5`; the parser of an option."""
    return ",".join(dict.fromkeys(str(average) for average in averages_of(text)))


def averages_of(text: str) -> list[Average]:
    """Return the averages in a text such as `ema:0.99,last:5`.

    Raises `ArgumentTypeError` for another notation.
    """
    return [_average(part.strip()) for part in text.split(",")]


def _average(text: str) -> Average:
    kind, _, number = text.partition(":")
    try:
        value = {"ema": float, "last": int}[kind](number)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not {NOTATION}") from None
    if kind == "ema" and not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the decay must be above 0 and below 1")
    if kind == "last" and value < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: must average at least 2 checkpoints")
    return Average(kind, value)
