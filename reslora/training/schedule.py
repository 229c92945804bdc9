"""Number of training steps of a method, and the steps at which it is validated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Number of training steps, and the steps between validations."""

    steps: int
    validation_steps: int
    """0 for none."""
    warmup_steps: int
    by_epochs: bool
    """Whether the number of steps follows from --num_train_epochs."""
    is_over: bool = False
    """Whether --early_stopping_patience ended training after these steps."""
    sampled: tuple[int, ...] | None = None
    """Steps after which samples are generated; None: after every validation."""

    def is_due(self, step: int) -> bool:
        """Return whether validation loss and samples are due after that step."""
        return bool(self.validation_steps) and (step % self.validation_steps == 0 or step == self.steps)

    def is_sampled(self, step: int) -> bool:
        """Return whether samples are due after that step."""
        return self.is_due(step) if self.sampled is None else step in self.sampled
