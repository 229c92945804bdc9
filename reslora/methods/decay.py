"""The factor of the shortcut terms while training, which falls to zero with --shortcut_decay."""

from torch import nn

from ..chains import base_model
from ..model import set_shortcut_scale
from ..wiring import connection_of
from . import controls


def factor_at(step: int, steps: int, part: float) -> float:
    """Return the factor after `step` of `steps` training steps; it is 1 before the first, and 0 after the last.

    It falls linearly over the first `part` of all steps (0 < part < 1), and is 0 after them. It depends on nothing
    else, so that it is the same in resumed runs and in all processes.
    """
    return max(0.0, 1 - step / (part * steps))


def set_factor(model: nn.Module, factor: float) -> None:
    """Multiply the shortcut terms of a connected model, or the terms that a control has instead, by `factor`."""
    if connection_of(base_model(model)) is not None:
        set_shortcut_scale(model, factor)
    else:
        controls.set_factor(model, factor)
