"""The losses of `--loss_type`. The options read this module, so it does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A loss of a model's prediction."""

    formula: "Callable[[Tensor, Tensor], Tensor]"
    """Function of the errors (prediction minus target) and the threshold of each sample, which broadcasts to them."""
    help: str
    has_threshold: bool = False
    """Whether the formula reads the threshold, which `--huber_schedule`, `--huber_c` and `--huber_scale` set."""


def squared(error: "Tensor", _threshold: "Tensor") -> "Tensor":
    """Return d^2 of the errors d."""
    return error.square()


def huber(error: "Tensor", threshold: "Tensor") -> "Tensor":
    """Return `2 h (sqrt(d^2 + h^2) - h)` of the errors d at threshold h, which is about d^2 for small d."""
    return threshold * smooth_l1(error, threshold)


def smooth_l1(error: "Tensor", threshold: "Tensor") -> "Tensor":
    """Return `2 (sqrt(d^2 + h^2) - h)` of the errors d at threshold h, which is about 2 |d| for large d."""
    square = error.square()
    return 2 * square / ((square + threshold.square()).sqrt() + threshold)  # numerically stable for d far below h


LOSSES = {
    "l2": Loss(squared, "squared error"),
    "huber": Loss(huber, "kohya's pseudo-Huber loss, which gives large errors less weight", has_threshold=True),
    "smooth_l1": Loss(smooth_l1, "kohya's loss that is about the absolute value of large errors", has_threshold=True),
}
