"""Requests to a run in training: stop, save or sample. All processes must act on them after the same step."""

import time
from pathlib import Path

from ..errors import Stopped
from ..runtime.processes import any_of_each, is_main
from .context import Context
from .state import Learner

SAVE, SAMPLE = "save.now", "sample.now"
"""Names of files that request a checkpoint or samples after the current step.

Any program may create such a file in the run's directory; the trainer removes it when it handles the request.
"""


class Requests:
    """The requests to handle after a step: a stop from any process; saving and sampling from the main process."""

    def __init__(self, context: Context) -> None:
        self.stop, self.folder, self.status, options = context.stop, context.folder, context.status, context.options
        self.every = options.output.checkpointing_steps
        self.no_samples = options.no_samples
        self.seconds = 60 * (options.output.checkpointing_minutes or float("inf"))
        self.saved()

    def saved(self) -> None:
        """Restart the interval of --checkpointing_minutes."""
        self.last = time.monotonic()

    def after_step(self) -> tuple[bool, bool, bool]:
        """Return whether to stop, to save and to sample; all processes must call it together and use its result."""
        main = is_main()
        save = main and (consume_request(self.folder / SAVE) or time.monotonic() - self.last >= self.seconds)
        sample = main and consume_request(self.folder / SAMPLE)
        if sample and self.no_samples:
            print(f"{SAMPLE}: this run generates no samples; {self.no_samples}", flush=True)
        asked = any_of_each([self.stop.signal is not None, save, sample and not self.no_samples])
        return self.stop.shared(asked[0]), asked[1], asked[2]


def consume_request(request: Path) -> bool:
    """Remove a request file, and return whether there was one.

    A file that cannot be removed is ignored, because it would be handled again after every step.
    """
    try:
        request.unlink()
    except OSError:
        return False
    return True


def stopped_at(learner: Learner) -> Stopped:
    """Return the exception of a run that was asked to stop."""
    return Stopped(f"{learner.name} stopped after step {learner.step}; resume with --resume_from_checkpoint latest")
