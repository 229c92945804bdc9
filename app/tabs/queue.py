"""Part of Runs: the queue of running, waiting and ended runs and experiments."""

from pathlib import Path

import gradio as gr

from .. import lists, views
from ..handlers import QUIET
from .base import Parts, Tab, TabHost, answer_line

SCRIPT = Path(__file__).resolve().parents[1] / "rows.js"
EVERY = 3.0
"""Seconds between two polls of the queue."""
IN_TURN = {"trigger_mode": "multiple", "concurrency_limit": 1}
"""Event options of row buttons: all clicks are handled in order, so that the last response shows the current list."""
ABOUT = (
    "Runs are trained one at a time. If a run fails, the next one starts. Waiting runs start automatically, also after "
    "a restart of the application."
)


class ListTab(Tab):
    """Base class of a tab with a list, which is polled while the tab is open. A subclass renders the list."""

    def show(self, *chosen: object) -> tuple[str, int]:
        """Return the list as HTML, and its hash."""
        html = self.render(*chosen)
        return html, hash(html)

    def open(self, *chosen: object) -> tuple:
        """Return the list and its hash, and start the timer; called when the tab is opened."""
        return *self.show(*chosen), gr.Timer(active=True)

    def look(self, *inputs: object):
        """Return the list and its hash, if it has changed; the last input is the hash of the list on the page."""
        *chosen, seen = inputs
        html, known = self.show(*chosen)
        return gr.skip() if known == seen else (html, known)


class QueueTab(ListTab):
    """The part that shows the queue."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        gr.Markdown(ABOUT)
        self.rows = gr.HTML(views.skeleton(), elem_id="queue", js_on_load=SCRIPT.read_text(encoding="utf-8"))
        self.answer = answer_line(elem_id="queue-answer")
        self.last_look = gr.State(None)
        self.timer = gr.Timer(EVERY, active=False)

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        shown = [self.rows, self.last_look]
        page.frames[self].select(self.open, None, [*shown, self.timer], **QUIET)
        self.timer.tick(self.look, self.last_look, shown, queue=False, **QUIET)
        self.rows.acted(self.act, None, [self.answer, *shown], **IN_TURN, **QUIET)

    def render(self) -> str:
        """Return the queue as HTML."""
        return lists.queue(self.jobs)

    def act(self, event: gr.EventData) -> tuple:
        """Handle a click on a button of a row; return a notice, the list and its hash."""
        what, name = event.do, event.name
        if what == "stop":
            return views.notice(self.jobs.stop_entry(name)), *self.show()
        self.jobs.remove(name)
        return "", *self.show()
