"""Define the base class of the tabs, and what all tabs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import gradio as gr

from ..jobs import Jobs
from ..library import Library
from ..runs import Run
from ..studio import Studio

T = TypeVar("T", bound="Tab")


def answer_line(value: str = "", **settings) -> gr.HTML:
    """Return a component that shows a button's result or progress; screen readers announce its changes."""
    return gr.HTML(value, js_on_load="element.setAttribute('role', 'status')", **settings)


def open_choice(label: str, **settings) -> gr.Dropdown:
    """Return a dropdown that accepts any value, because its choices may be out of date. Handlers validate the value."""
    return gr.Dropdown(label=label, allow_custom_value=True, interactive=True, **settings)


@dataclass(frozen=True)
class Parts:
    """Objects that all tabs share."""

    library: Library
    jobs: Jobs
    studio: Studio


class TabHost(Protocol):
    """The attributes of the page that tabs use."""

    blocks: gr.Blocks
    run: gr.Dropdown
    """Dropdown with the name of the selected run."""
    seen: gr.State
    """The state of the last poll."""
    all_tabs: gr.Tabs
    views: gr.Tabs
    """The tabs inside Compare."""
    frames: dict[Tab, gr.Tab]
    """Gradio's innermost tab that contains each part."""

    def tab(self, cls: type[T]) -> T:
        """Return the tab that is an instance of this class."""


class Tab:
    """Base class of the parts of the page; a subclass makes its components in the constructor.

    The page only calls the methods of this class; a subclass overrides the methods that it needs.
    """

    fold: ClassVar[str] = ""
    """Title of the collapsed section that contains the part; empty if it is always visible."""
    chosen: gr.components.Component | None = None
    """The component by which the user selects what to show of a run (such as a step), or None."""

    def __init__(self, parts: Parts) -> None:
        self.library, self.jobs, self.studio = parts.library, parts.jobs, parts.studio
        self.live: list[gr.components.Component] = []
        """Components that every poll updates while a trainer is running."""
        self.watched: list[gr.components.Component] = []
        """Components that a poll updates only if the run has changed."""
        self.of_run: list[gr.components.Component] = []
        """Components that are set when a run is selected; afterwards the user may change them."""
        self.on_arrival: list[gr.components.Component] = []
        """Components that are set when the page is opened."""

    def events(self, page: TabHost) -> None:
        """Connect the events of the components; `page` gives access to the components of other tabs."""

    def arrive(self) -> dict:
        """Return the new values of the components in `on_arrival`, by component."""
        return {}

    def seen(self, run: Run) -> object:
        """Return the tab's part of the polled state: a value that changes if the tab must be updated."""
        return None

    def live_state(self, run: Run) -> object:
        """Return a value that changes if the components in `live` must be updated."""
        return None

    def choice(self, run: Run, chosen: object, seen: object) -> object:
        """Return the new value of the component `self.chosen`.

        `chosen`: the current value of the component. `seen`: the tab's part of the state at the last poll. Both
        arguments are None in the first poll of a run.
        """
        return None

    def updates(self, run: Run, status: str) -> dict:
        """Return the new values of the components in `live`, by component."""
        return {}

    def shown(self, run: Run, choice: object) -> dict:
        """Return the new values of the components in `watched`, by component.

        `choice`: the new value of the component `self.chosen`.
        """
        return {}

    def filled_in(self, run: Run) -> dict:
        """Return the new values of the components in `of_run`, by component."""
        return {}

    def is_outdated(self, run: Run, seen: object) -> bool:
        """Return whether the components in `of_run` must be set again.

        `seen`: the tab's part of the state at the last poll."""
        return False
