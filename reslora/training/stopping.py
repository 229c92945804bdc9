"""Requests to a run in training: stop, save, sample or pause. All processes must act on them after the same step."""

import time
from pathlib import Path
from typing import NamedTuple

from ..errors import Stopped
from ..runtime.processes import any_of_each, broadcast_from_main, is_main
from .context import Context
from .state import Learner

SAVE, SAMPLE, PAUSE = "save.now", "sample.now", "pause.now"
"""Names of files that request a checkpoint, samples or a pause after the current step.

Any program may create such a file in the run's directory. The trainer removes the first two when it handles the
request; it pauses as long as the third exists.
"""
POLL = 1.0  # seconds between two looks at the files while paused


class Asked(NamedTuple):
    """What was requested; the same in all processes."""

    stop: bool = False
    save: bool = False
    samples: str | None = None
    """The prompts of the requested samples, one per line; empty for the run's own, None for no request."""
    pause: bool = False


class Requests:
    """The requests to handle after a step: a stop from any process, all others from the main process."""

    def __init__(self, context: Context) -> None:
        self.stop, self.folder, self.status, self.options = (
            context.stop,
            context.folder,
            context.status,
            context.options,
        )
        self.every = self.options.output.checkpointing_steps
        self.seconds = 60 * (self.options.output.checkpointing_minutes or float("inf"))
        self.saved()

    def saved(self) -> None:
        """Restart the interval of --checkpointing_minutes."""
        self.last = time.monotonic()

    def after_step(self) -> Asked:
        """Return what is requested; all processes must call it together and use its result."""
        main = is_main()
        pause = main and (self.folder / PAUSE).exists()
        due = main and not pause and time.monotonic() - self.last >= self.seconds
        save = main and consume_request(self.folder / SAVE) is not None
        samples = consume_request(self.folder / SAMPLE) if main else None
        if samples is not None and (reason := self.options.no_samples(samples)):
            print(f"{SAMPLE}: this run generates no samples; {reason}", flush=True)
            samples = None
        stop, save, sample, pause = any_of_each([self.stop.signal is not None, save or due, samples is not None, pause])
        return Asked(self.stop.shared(stop), save, broadcast_from_main(lambda: samples) if sample else None, pause)

    def wait(self, learner: Learner) -> None:
        """Wait a moment while paused."""
        self.status.say(f"paused at step {learner.step}", learner.name)
        time.sleep(POLL)


def consume_request(request: Path) -> str | None:
    """Remove a request file, and return its content; None if there is none.

    A file that cannot be removed is ignored, because it would be handled again after every step.
    """
    try:
        content = request.read_text(encoding="utf-8-sig", errors="replace").strip()
        request.unlink()
    except OSError:
        return None
    return content


def stopped_at(learner: Learner) -> Stopped:
    """Return the exception of a run that was asked to stop."""
    return Stopped(f"{learner.name} stopped after step {learner.step}; resume with --resume_from_checkpoint latest")
