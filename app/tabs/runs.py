"""Part of Runs: all runs and experiments with notes, and the trash, from which they can be restored."""

import gradio as gr

from .. import lists, views
from ..handlers import QUIET, server_function
from ..library import Experiment
from ..run_manager import RunManager
from ..runs import RunError
from .base import Parts, TabHost, answer_line
from .queue import IN_TURN, SCRIPT, ListTab
from .report import ReportTab

EVERY = 5.0
"""Seconds between two polls of the runs folder."""


class RunsTab(ListTab):
    """The part that lists all runs and experiments."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.manager = RunManager(self.jobs)
        self.words = gr.Textbox(label="Search names and notes", max_lines=1, elem_id="runs-words")
        self.answer = answer_line(elem_id="runs-answer")
        script = SCRIPT.read_text(encoding="utf-8")
        self.cards = gr.HTML(
            views.skeleton("tall"),
            elem_id="runs",
            js_on_load=script,
            server_functions=[server_function(self.save_notes)],
        )
        self.last_look = gr.State(None)
        self.timer = gr.Timer(EVERY, active=False)

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        shown = [self.cards, self.last_look]
        page.frames[self].select(self.open, self.words, [*shown, self.timer], **QUIET)
        self.words.change(self.show, self.words, shown, trigger_mode="always_last", **QUIET)
        self.timer.tick(self.look, [self.words, self.last_look], shown, queue=False, **QUIET)
        opened = [page.all_tabs, page.views, page.run, page.tab(ReportTab).which]
        answered = [self.answer, *shown, *opened]
        self.cards.acted(self.act, self.words, answered, **IN_TURN, **QUIET)
        gr.api(self.manager.write_notes, api_name="set_run_notes")

    def render(self, words: str) -> str:
        """Return as HTML the cards of the runs whose name or notes contain `words`, and the trash."""
        return lists.runs(self.manager, str(words or ""))

    def act(self, words: str, event: gr.EventData) -> tuple:
        """Handle a click on a button of a card or of the trash; return updates of answer, list, tabs and selectors."""
        what, name = event.do, event.name
        if what == "open":
            return gr.skip(), gr.skip(), gr.skip(), *self.opened(name)
        if what == "trash":
            line = self.manager.throw_away(name)
        elif what == "rename":
            line = self.manager.rename(name, getattr(event, "to", None))
        elif what == "restore":
            line = self.manager.restore(name)
        else:
            raise RunError("Unknown action: reload the page.")
        return views.notice(line), *self.show(words), *(gr.skip(),) * 4

    def opened(self, name: str) -> tuple:
        """Return the outer and the inner tab to open for a run or experiment, and the values of the run and experiment
        dropdowns."""
        found = self.library.find_any(name)
        if isinstance(found, Experiment):
            return gr.Tabs(selected="compare"), gr.Tabs(selected="experiment"), gr.skip(), found.name
        return gr.Tabs(selected="compare"), gr.Tabs(selected="run"), self.library.find(name).name, gr.skip()

    def save_notes(self, edit: dict) -> dict:
        """Save the notes on a run, and return them as stored. The page is not updated after saving, because the user
        may already type other notes.

        `edit`: keys name, was (the notes that the user saw) and text."""
        return {"notes": self.manager.write_notes(edit.get("name"), edit.get("was"), edit.get("text"))}
