"""What a tab of the page is: components, what a look at a run shows in them, and what a visitor chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import gradio as gr

from ..jobs import Jobs
from ..library import Library
from ..runs import Run
from ..studio import Studio
from ..working import WorkingFiles

if TYPE_CHECKING:
    from ..page import Page


STATUS = 3
"""Where in what a look has seen of a run its status is."""


def answer_line(value: str = "", **settings) -> gr.HTML:
    """What a button has done, or how far that is: a screen reader says it whenever it changes."""
    return gr.HTML(value, js_on_load="element.setAttribute('role', 'status')", **settings)


@dataclass(frozen=True)
class Parts:
    """What the tabs work with."""

    library: Library
    jobs: Jobs
    studio: Studio
    files: WorkingFiles = field(default_factory=WorkingFiles)


class Tab:
    """A tab makes its components where it is made. The page asks it what to show, and iterates over tabs alone.

    A subclass says what it differs in; all that is here may be left as it is.
    """

    title: ClassVar[str]
    id: ClassVar[str]
    chosen: gr.components.Component | None = None
    """The component in which a visitor chooses what of a run is shown; None where there is nothing to choose."""

    def __init__(self, parts: Parts) -> None:
        self.library, self.jobs = parts.library, parts.jobs
        self.studio, self.files = parts.studio, parts.files
        self.live: list[gr.components.Component] = []
        """What changes from look to look while a trainer is at work."""
        self.watched: list[gr.components.Component] = []
        """What a look at the run brings up to date that finds something new to see."""
        self.of_run: list[gr.components.Component] = []
        """What is filled in when a run is chosen, and left to the visitor after that."""
        self.on_arrival: list[gr.components.Component] = []
        """What is filled in when somebody opens the page."""

    def events(self, page: Page) -> None:
        """Connects the components; those of other tabs are had from the page."""

    def arrive(self) -> dict:
        """Values of `on_arrival`."""
        return {}

    def seen(self, run: Run) -> object:
        """What the tab must know of a look at the run when it is looked at again."""
        return None

    def choice(self, run: Run, chosen: object, seen: object) -> object:
        """What `chosen` is to be now: it may move on with the run. None, both of them, with the first look at a run."""
        return None

    def updates(self, run: Run, status: str) -> dict:
        """Values of `live`."""
        return {}

    def shown(self, run: Run, choice: object) -> dict:
        """Values of `watched`."""
        return {}

    def filled_in(self, run: Run) -> dict:
        """Values of `of_run`."""
        return {}

    def is_outdated(self, run: Run, seen: object) -> bool:
        """Whether `of_run` is to be filled in anew since a look."""
        return False
