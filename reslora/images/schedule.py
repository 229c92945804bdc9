"""The schedule of an image run, from its options and the number of its images."""

from ..formatting import pluralize
from ..methods.registry import check_steps
from ..training.schedule import Schedule
from .context import ImageContext

UNWARMED = ("constant", "piecewise_constant")
"""Values of --lr_scheduler without warmup."""
LONGEST_WARMUP, WARMUP_SHARE = 500, 0.1


def schedule_of(updates: int, context: ImageContext) -> Schedule:
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


def steps_of(schedule: Schedule) -> dict[str, int]:
    """Return the options that the schedule determines, with their values."""
    return {"max_train_steps": schedule.steps, "validation_steps": schedule.validation_steps}
