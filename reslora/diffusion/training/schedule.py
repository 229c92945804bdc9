"""How long a method trains, and when it is looked at."""

from __future__ import annotations

from dataclasses import dataclass

from ...common.methods import check_steps
from ...words import counted
from ..context import Context

UNWARMED = ("constant", "piecewise_constant")
"""Values of --lr_scheduler that have no warmup."""
LONGEST_WARMUP, WARMUP_SHARE = 500, 0.1


@dataclass(frozen=True)
class Schedule:
    """How long a method trains, and when it is looked at."""

    steps: int
    validation_steps: int
    warmup_steps: int
    by_epochs: bool
    """Whether the number of steps came from --num_train_epochs."""
    is_over: bool = False
    """Whether --early_stopping_patience has ended it after these steps."""

    def is_due(self, step: int) -> bool:
        """Return whether there are to be a validation loss and samples after that step."""
        return step % self.validation_steps == 0 or step == self.steps


def schedule_of(updates: int, context: Context) -> Schedule:
    """Return how long each method trains, with so many updates an epoch, and when it is looked at.

    Refuses fewer steps than AdaLoRA needs.
    """
    options = context.options
    steps = options.training.max_train_steps or options.training.num_train_epochs * updates
    check_steps(options.adapter.method, steps, f"--max_train_steps {steps}")
    validation_steps = options.validation.validation_steps or options.validation.validation_epochs * updates
    warmup = options.optimizer.lr_warmup_steps
    warmup = min(LONGEST_WARMUP, int(WARMUP_SHARE * steps)) if warmup is None else warmup
    if warmup >= steps and options.optimizer.lr_scheduler not in UNWARMED:
        ends = f"the run has {counted(steps, 'step')}, and the learning rate only rises"
        context.tell_once(f"warning: --lr_warmup_steps {warmup}: {ends}")
    return Schedule(steps, validation_steps, warmup, by_epochs=not options.training.max_train_steps)
