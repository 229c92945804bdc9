"""Runs: the queue, and all runs and experiments with notes, and the trash, from which they can be restored."""

from functools import partial
from pathlib import Path

import gradio as gr

from .. import lists, views
from ..handlers import QUIET, server_function
from ..library import Experiment
from ..run_manager import RunManager
from ..runs import pick
from .base import Parts, Tab, TabHost, answer_line
from .report import ReportTab

SCRIPT = Path(__file__).resolve().parents[1] / "rows.js"
EVERY = 3.0
"""Seconds between two polls of the runs folder."""
ABOUT = (
    "Runs are trained one at a time. If a run fails, the next one starts. Waiting runs start automatically, also after "
    "a restart of the application."
)


class RunsTab(Tab):
    """The tab that lists the queue, and all runs and experiments; it is polled while it is open."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.manager = RunManager(self.jobs)
        script = SCRIPT.read_text(encoding="utf-8")
        gr.Markdown(ABOUT)
        self.queue = gr.HTML(views.LOADING, elem_id="queue", js_on_load=script)
        self.words = gr.Textbox(label="Search names and notes", max_lines=1, elem_id="runs-words")
        self.answer = answer_line(elem_id="runs-answer")
        save_notes = server_function(self.save_notes)
        self.cards = gr.HTML(views.LOADING, elem_id="runs", js_on_load=script, server_functions=[save_notes])
        self.last_look = gr.State(None)
        self.timer = gr.Timer(EVERY, active=False)

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        shown = [self.queue, self.cards, self.last_look]
        opened = page.frames[self].select(self.show, self.words, shown, **QUIET)
        opened.success(lambda: gr.Timer(active=True), None, self.timer, **QUIET)
        self.words.change(self.show, self.words, shown, trigger_mode="always_last", **QUIET)
        self.timer.tick(self.look, [self.words, self.last_look], shown, queue=False, **QUIET)
        places = [page.all_tabs, page.views, page.run, page.tab(ReportTab).which]
        # All clicks are handled in order, so that the last response shows the current lists.
        in_turn = {"trigger_mode": "multiple", "concurrency_limit": 1, "concurrency_id": "rows"}
        for rows in (self.queue, self.cards):
            rows.acted(self.act, self.words, [self.answer, *shown, *places], **in_turn, **QUIET)
        gr.api(self.manager.write_notes, api_name="set_run_notes")

    def show(self, words: str) -> tuple[str, str, tuple]:
        """Return as HTML the queue, and the runs whose name or notes contain `words`; and the hashes of both."""
        shown = lists.queue(self.jobs), lists.runs(self.manager, str(words or ""))
        return *shown, tuple(map(hash, shown))

    def look(self, words: str, seen: tuple) -> object:
        """Return what `show` returns, without a list that has not changed; `seen`: hashes of the lists on the page."""
        *shown, now = self.show(words)
        if now == seen:
            return gr.skip()
        changed = [html if new != old else gr.skip() for html, new, old in zip(shown, now, seen, strict=True)]
        return *changed, now

    def act(self, words: str, event: gr.EventData) -> tuple:
        """Handle a click on a button of a row or a card; return updates of answer, lists, tabs and selectors."""
        if event.do == "open":
            return *(gr.skip(),) * 4, *self.opened(event.name)
        actions = {
            "stop": lambda name: self.jobs.stop(self.library.find_any(name)),
            "remove": self.jobs.remove,
            "trash": self.manager.throw_away,
            "rename": partial(self.manager.rename, new=getattr(event, "to", None)),
            "restore": self.manager.restore,
        }
        action = pick(actions, event.do, "Unknown action: reload the page.")
        return views.notice(action(event.name)), *self.show(words), *(gr.skip(),) * 4

    def opened(self, name: str) -> tuple:
        """Return the outer and the inner tab to open for a run or experiment, and the values of the run and experiment
        dropdowns."""
        is_experiment = isinstance(self.library.find_any(name), Experiment)
        view, values = ("experiment", (gr.skip(), name)) if is_experiment else ("run", (name, gr.skip()))
        return gr.Tabs(selected="compare"), gr.Tabs(selected=view), *values

    def save_notes(self, edit: dict) -> dict:
        """Save the notes on a run, and return them as stored. The page is not updated after saving, because the user
        may already type other notes.

        `edit`: keys name, was (the notes that the user saw) and text."""
        return {"notes": self.manager.write_notes(edit.get("name"), edit.get("was"), edit.get("text"))}
