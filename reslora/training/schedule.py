"""Number of training steps of a method, and the steps at which it is validated."""

from dataclasses import dataclass

from ..formatting import pluralize
from ..methods.registry import check_steps
from .context import Context

UNWARMED = ("constant", "piecewise_constant")
"""Values of --lr_scheduler without warmup."""
LONGEST_WARMUP, WARMUP_SHARE = 500, 0.1


@dataclass(frozen=True)
class Schedule:
    """Number of training steps, and the steps between validations."""

    steps: int
    validation_steps: int
    warmup_steps: int
    by_epochs: bool
    """Whether the number of steps follows from --num_train_epochs."""
    is_over: bool = False
    """Whether --early_stopping_patience ended training after these steps."""
    sampled: tuple[int, ...] | None = None
    """Steps after which samples are generated; None: after every validation."""

    def is_due(self, step: int) -> bool:
        """Return whether validation loss and samples are due after that step."""
        return step % self.validation_steps == 0 or step == self.steps

    def is_sampled(self, step: int) -> bool:
        """Return whether samples are due after that step."""
        return self.is_due(step) if self.sampled is None else step in self.sampled


def schedule_of(updates: int, context: Context) -> Schedule:
    """Return the schedule of a method. `updates`: the number of optimizer steps in an epoch.

    Raises `InvalidArgument` for fewer steps than AdaLoRA needs.
    """
    options = context.options
    steps = options.training.max_train_steps or options.training.num_train_epochs * updates
    check_steps(options.adapter.method, steps, f"--max_train_steps {steps}")
    validation_steps = options.validation.validation_steps or options.validation.validation_epochs * updates
    warmup = options.optimizer.lr_warmup_steps
    warmup = min(LONGEST_WARMUP, int(WARMUP_SHARE * steps)) if warmup is None else warmup
    if warmup >= steps and options.optimizer.lr_scheduler not in UNWARMED:
        ends = f"the run has {pluralize(steps, 'step')}, and the learning rate only rises"
        context.print_once(f"warning: --lr_warmup_steps {warmup}: {ends}")
    return Schedule(steps, validation_steps, warmup, by_epochs=not options.training.max_train_steps)
