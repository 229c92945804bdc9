"""The page: a run to choose, the tabs over it, and what keeps them up to date."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import gradio as gr

from . import views
from .activity import activity
from .handlers import QUIET, readable_errors
from .jobs import Jobs
from .library import Library
from .runs import Run
from .sessions import Blocks
from .studio import Studio
from .tabs import TABS, Parts, Tab
from .tabs.base import STATUS
from .tabs.compare import CompareTab

T = TypeVar("T", bound=Tab)

EVERY = 2.0
"""Seconds between two looks at the runs folder."""
RUNS_SEEN = 1
"""Where in what was seen the names of the runs are."""
AT_REST = STATUS
"""How much of what was seen stays as it is while a trainer merely goes on; the rest is `live`."""
STYLE, *SCRIPTS = (Path(__file__).with_name(name) for name in ("style.css", "streams.js", "zoom.js"))
# The first tab says that it is selected before anything else has happened, which is no visitor's choice.
STORE = "run => { if (window.recalled) sessionStorage.setItem('reslora-%s', %s ?? ''); }"
RECALL = """() => {
    window.recalled = true;
    return ['run', 'tab'].map(name => sessionStorage.getItem(`reslora-${name}`));
}"""
# Messages are outside of what the style sheet is for: in a corner where they cover no button.
TOASTS = "<style>@media (min-width: 641px) { .toast-wrap { top: auto !important; bottom: 16px; } }</style>"
EXPLANATION = (
    "ResLoRA trains LoRA blocks with residual shortcuts between neighbouring layers, then merges them away; "
    "what is left is a plain LoRA. All images in a row have the same caption and seed: only the method differs."
)
TITLE = f"<h1>ResLoRA for Stable Diffusion</h1><details><summary>What is this?</summary><p>{EXPLANATION}</p></details>"


def create_demo(library: Library, jobs: Jobs, studio: Studio) -> gr.Blocks:
    """The page as Gradio blocks; nothing is loaded or read before somebody looks at it."""
    with Blocks(
        title="ResLoRA for Stable Diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as demo:
        Page(Parts(library, jobs, studio)).events(demo)
    demo.queue(max_size=32, default_concurrency_limit=4)
    return demo


def look() -> dict:
    """Theme, style and script, as `launch` takes them; system fonts only, so that the page works offline."""
    theme = gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(  # readable: at least 4.5 to 1
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        slider_color="*primary_700", slider_color_dark="*primary_600",
    )  # fmt: skip
    scripts = TOASTS + "".join(f"<script>{path.read_text(encoding='utf-8')}</script>" for path in SCRIPTS)
    return {"theme": theme, "css_paths": [STYLE], "head": scripts}


class Page:
    """The tabs, and what they have in common: the run."""

    def __init__(self, parts: Parts) -> None:
        self.library, self.jobs = parts.library, parts.jobs
        with gr.Row(elem_id="top"):
            gr.HTML(TITLE, elem_id="title")
            # Any value may be sent, so that runs begun meanwhile can be; the library decides whether there is one.
            self.run = gr.Dropdown(label="Run", allow_custom_value=True, interactive=True, elem_id="run", min_width=240)
        self.summary = gr.HTML(elem_id="summary")
        self.tabs: list[Tab] = []
        self.frames: dict[Tab, gr.Tab] = {}
        with gr.Tabs() as self.all_tabs:
            for cls in TABS:
                with gr.Tab(cls.title, id=cls.id) as frame:
                    self.tabs.append(cls(parts))
                self.frames[self.tabs[-1]] = frame
        self.beside = self.tab(CompareTab).beside
        self.choosing = [tab for tab in self.tabs if tab.chosen is not None]
        self.blocks: gr.Blocks
        self.seen = gr.State(None)
        self.timer = gr.Timer(EVERY)
        self.nudge = gr.Button(visible="hidden", elem_id="nudge")  # pressed by streams.js alone

    def tab(self, cls: type[T]) -> T:
        """The tab of that class."""
        return next(tab for tab in self.tabs if isinstance(tab, cls))

    def events(self, demo: gr.Blocks) -> None:
        self.blocks = demo
        everything = [self.seen, self.run, self.summary]
        everything += [part for tab in self.tabs for part in (*tab.live, *tab.watched, *tab.of_run)]
        on_arrival = [self.run, *(part for tab in self.tabs for part in tab.on_arrival)]
        # The browser stores run and tab, for a page that is loaded again, as after a restart of the application.
        demo.load(
            readable_errors(self.arrive), [self.run, self.summary], [*on_arrival, self.all_tabs],
            js=RECALL, preprocess=False, **QUIET,
        )  # fmt: skip
        self.run.change(None, self.run, None, js=STORE % ("run", "run"), **QUIET)
        for tab, frame in self.frames.items():
            frame.select(None, js=STORE % ("tab", f"'{tab.id}'"), **QUIET)
        self.run.change(readable_errors(self.choose), [self.run, self.beside], everything, **QUIET)
        context = [self.run, self.beside, self.seen, *(tab.chosen for tab in self.choosing)]
        # Not queued: a look that is lost with its queue's stream would be waited for, and the page would stand still.
        # Not preprocessed: a step sent while another run was being chosen is beyond that run's last one, and refused.
        self.timer.tick(readable_errors(self.watch), context, everything, queue=False, preprocess=False, **QUIET)
        self.nudge.click(lambda: None, **QUIET)
        for tab in self.tabs:
            tab.events(self)
        gr.api(readable_errors(self.list_runs), api_name="runs")

    def list_runs(self) -> list[str]:
        """Names of the runs, the newest first."""
        return list(self.library.runs())

    def arrive(self, run: object = None, tab: object = None) -> dict:
        """Somebody opens the page: the run and tab that were seen last, else the run that trains, else the newest."""
        runs = self.library.runs()
        first = next((name for name, run in runs.items() if run.process), next(iter(runs), None))
        values = {self.run: gr.update(choices=list(runs), value=run if run in list(runs) else first)}
        if tab in [one.id for one in self.tabs]:
            values[self.all_tabs] = gr.Tabs(selected=tab)
        for tab in self.tabs:
            values |= tab.arrive()
        return values

    def choose(self, name: str, beside: list[str] | None):
        """Everything that is seen of a run, at its last step."""
        if not name:
            return gr.skip()
        run = self.library.beside(self.library.find(name), beside)
        values = self.shown(run, {tab: tab.choice(run, None, None) for tab in self.choosing})
        for tab in self.tabs:
            values |= tab.filled_in(run)
        return values

    def watch(self, name: str, beside: list[str] | None, seen: tuple | None, *chosen: object):
        """What has changed since the last look.

        What stays as chosen is not sent: somebody may have chosen anew since. Nor is anything before `choose` has
        answered, which sends it.
        """
        runs = self.library.runs()
        if not name or name not in runs:
            # Somebody may be typing; a run that was shown and is gone gives way to the newest.
            gone = seen is not None and name in seen[RUNS_SEEN]
            first = {"value": next(iter(runs), None)} if gone else {}
            return {self.run: gr.update(choices=list(runs), **first)} if gone or (runs and seen is None) else gr.skip()
        run = self.library.beside(runs[name], beside)
        state = self.state_of(run)
        if seen and state[:AT_REST] == seen[:AT_REST]:
            return {self.seen: state} | self.updates(run, state[AT_REST]) if state != seen else gr.skip()
        before = dict(zip(self.tabs, seen[0] if seen else [None] * len(self.tabs), strict=True))
        was = dict(zip(self.choosing, chosen, strict=True))
        choices = {tab: tab.choice(run, was[tab], before[tab]) for tab in self.choosing}
        updates = self.shown(run, choices)
        for tab, choice in choices.items():
            if choice == was[tab] or not seen:
                del updates[tab.chosen]["value"]
        if updates[self.beside]["value"] == (beside or []):
            del updates[self.beside]["value"]
        for tab in self.tabs:
            if tab.is_outdated(run, before[tab]):
                updates |= tab.filled_in(run)
        return updates

    def state_of(self, run: Run) -> tuple:
        """What `watch` compares: when it is the same, the page is up to date. First what each tab has seen, then
        the names of the runs and, after what is at rest, the run's status and what its trainer says."""
        seen = tuple(tab.seen(run) for tab in self.tabs)
        at_rest = seen, tuple(self.library.runs()), run.fingerprint()
        return *at_rest, self.jobs.status(run), activity(run.activity), run.log_tail()

    def updates(self, run: Run, status: str) -> dict:
        """Values of what changes from look to look: the line about the run, and what the tabs have of the kind."""
        values = {self.summary: views.summary(run, status, self.jobs.last_line(run))}
        for tab in self.tabs:
            values |= tab.updates(run, status)
        return values

    def shown(self, run: Run, choices: dict[Tab, object]) -> dict:
        """Values of the components that `watch` keeps up to date."""
        state = self.state_of(run)  # before all else: what changes meanwhile is seen by the next look
        values = {self.seen: state, self.run: gr.update(choices=list(self.library.runs()))}
        values |= self.updates(run, state[AT_REST])
        for tab in self.tabs:
            values |= tab.shown(run, choices.get(tab))
        return values
