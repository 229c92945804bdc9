"""Set the factor of the shortcut terms during training, which --shortcut_decay lowers to zero."""

from torch import nn

from ..chains import base_model
from ..model import set_shortcut_scale
from ..wiring import connection_of
from . import controls


def factor_at(step: int, steps: int, part: float) -> float:
    """Return the factor of the shortcut terms after `step` of `steps` training steps.

    It falls linearly from 1 to 0 over the first fraction `part` of all steps (0 < part < 1), and then stays 0. It
    depends only on these arguments, so it is the same in resumed runs and in all processes.
    """
    return max(0.0, 1 - step / (part * steps))


def set_factor(model: nn.Module, factor: float) -> None:
    """Multiply the shortcut terms of a connected model, or the terms that replace them in a control, by `factor`."""
    if connection_of(base_model(model)) is not None:
        set_shortcut_scale(model, factor)
    else:
        controls.set_factor(model, factor)
