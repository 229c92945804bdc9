"""Define the base class of the tabs, and what all tabs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import gradio as gr

from ..handlers import NO_PROGRESS
from ..jobs import Jobs
from ..library import Library
from ..runs import Run
from ..studio import Studio

T = TypeVar("T", bound="Tab")
Inputs = gr.components.Component | list[gr.components.Component]


def answer_line(value: str = "", **settings) -> gr.HTML:
    """Return a component that shows a button's result or progress; screen readers announce its changes."""
    return gr.HTML(value, js_on_load="element.setAttribute('role', 'status')", **settings)


def open_choice(label: str, **settings) -> gr.Dropdown:
    """Return a dropdown that accepts any value, because its choices may be out of date. Handlers validate the value."""
    return gr.Dropdown(label=label, allow_custom_value=True, interactive=True, **settings)


def download(button: gr.Button, handler: Callable[..., str], inputs: Inputs, api_name: str) -> None:
    """Let a button download the file whose path a handler returns."""
    file = gr.DownloadButton(visible="hidden", elem_id=f"{button.elem_id}-file")
    made = button.click(handler, inputs, file, api_name=api_name, preprocess=False, **NO_PROGRESS)
    made.success(None, js=f"() => document.querySelector('#{file.elem_id}').click()")


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

    chosen: gr.components.Component | None = None
    """The component by which the user selects what to show of a run (such as a step), or None."""

    def __init__(self, parts: Parts) -> None:
        self.library, self.jobs, self.studio = parts.library, parts.jobs, parts.studio
        self.polled: list[gr.components.Component] = []
        """Components that polls update: those that `updates`, `shown` and `filled_in` return values of."""
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
        """Return a value that changes if `updates` must be called."""
        return None

    def choice(self, run: Run, chosen: object, seen: object) -> object:
        """Return the new value of the component `self.chosen`.

        `chosen`: the current value of the component. `seen`: the tab's part of the state at the last poll. Both
        arguments are None in the first poll of a run.
        """
        return None

    def updates(self, run: Run, status: str) -> dict:
        """Return the new values of components that every poll updates while a trainer is running, by component."""
        return {}

    def shown(self, run: Run, choice: object) -> dict:
        """Return the new values of components that a poll updates only if the run has changed, by component.

        `choice`: the new value of the component `self.chosen`.
        """
        return {}

    def filled_in(self, run: Run) -> dict:
        """Return the values of components that are set when a run is selected, by component.

        Afterwards the user may change them.
        """
        return {}

    def is_outdated(self, run: Run, seen: object) -> bool:
        """Return whether `filled_in` must be called again.

        `seen`: the tab's part of the state at the last poll."""
        return False
