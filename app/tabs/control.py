"""Define the base class of Train and the experiment report: stop and resume runs or experiments."""

from typing import ClassVar

import gradio as gr

from .. import views
from ..folders import BUNDLED
from ..handlers import NO_PROGRESS
from ..jobs import RUNNING, Entry
from ..library import Experiment
from ..lists import shown_settings
from ..runs import Run
from .base import Tab


class ControlTab(Tab):
    """Base class of a tab with the buttons Stop and Resume, for runs or for experiments.

    The endpoints are `train_stop` and `train_resume` for runs, and `experiment_stop` and `experiment_resume`.
    """

    kind: ClassVar[type[Run]] = Run

    @property
    def what(self) -> str:
        """What the buttons stop and resume: `run` or `experiment`."""
        return self.kind.__name__.lower()

    def control(self, which: gr.components.Component) -> None:
        """Connect the buttons; `which` selects the run or experiment."""
        prefix = "train" if self.kind is Run else self.what
        # Queued, although it never has to wait: an unqueued event would not show its error.
        self.stop.click(
            self.do_stop, which, self.answer, api_name=f"{prefix}_stop", concurrency_limit=None, **NO_PROGRESS
        )
        self.resume.click(self.do_resume, which, self.answer, api_name=f"{prefix}_resume", **NO_PROGRESS)
        gr.api(self.list_names, api_name=f"{self.what}s")

    def list_names(self) -> list[str]:
        """Return the names of the runs or experiments, newest first."""
        return list(self.library.experiments() if self.kind is Experiment else self.library.runs())

    def do_stop(self, name: str) -> str:
        """Stop the selected run or experiment, and return a notice."""
        return views.notice(self.jobs.stop(self.library.find(name, self.kind)))

    def do_resume(self, name: str) -> str:
        """Resume a stopped run or experiment, or add it to the queue; return a notice."""
        run = self.library.find(name, self.kind)
        return views.notice(
            self.outcome_of(self.jobs.add(Entry(run.name, self.what, shown_settings(run), resume=True)))
        )

    def outcome_of(self, entry: Entry) -> str:
        """Return a sentence on an entry that was added to the queue: its state and, for a new run, its images."""
        named = {BUNDLED: "the bundled images", ".": "the images in the data folder"}
        images = f" with {named.get(entry.folder, f'the images in {entry.folder}')}" if entry.folder else ""
        if entry.state == RUNNING:
            begins = "resumes from its newest checkpoint" if entry.resume else "starts"
            return f"{entry.name} {begins}{images}."
        return f"{entry.name} waits in the queue and starts automatically{images}."
