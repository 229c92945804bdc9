"""Assemble the page: the run selector, the tabs, and the timer that keeps them up to date."""

from pathlib import Path

import gradio as gr

from . import views
from .activity import activity
from .handlers import QUIET, readable_errors
from .jobs import Jobs
from .library import Library
from .runs import Run
from .sessions import Blocks
from .studio import Studio
from .tabs import TABS
from .tabs.base import STATUS, Parts, T, Tab, open_choice
from .tabs.compare import CompareTab

EVERY = 2.0
"""Seconds between two polls of the runs folder."""
RUNS_SEEN = 1
"""Index of the run names in the polled state."""
AT_REST = STATUS
"""Index in the polled state. A change of an entry before it updates all components; a change of a later entry (status,
activity, log) only updates the summary and the `live` components."""
STYLE, *SCRIPTS = (Path(__file__).with_name(name) for name in ("style.css", "streams.js", "zoom.js"))
# Gradio selects the first tab when the page loads; `recalled` prevents storing that as the user's choice.
STORE = "run => { if (window.recalled) sessionStorage.setItem('reslora-%s', %s ?? ''); }"
RECALL = """() => {
    window.recalled = true;
    return ['run', 'tab'].map(name => sessionStorage.getItem(`reslora-${name}`));
}"""
# Toast messages are outside of the style sheet's scope: place them in a corner, where they cover no button.
TOASTS = "<style>@media (min-width: 641px) { .toast-wrap { top: auto !important; bottom: 16px; } }</style>"
EXPLANATION = (
    "ResLoRA trains LoRA blocks with residual shortcuts between neighbouring layers, then merges them away; "
    "what is left is a plain LoRA. All images in a row have the same caption and seed: only the method differs."
)
TITLE = f"<h1>ResLoRA for Stable Diffusion</h1><details><summary>What is this?</summary><p>{EXPLANATION}</p></details>"


def create_demo(library: Library, jobs: Jobs, studio: Studio) -> gr.Blocks:
    """Return the page as Gradio blocks; no model and no run is read before the page is opened."""
    with Blocks(
        title="ResLoRA for Stable Diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as demo:
        Page(Parts(library, jobs, studio)).events(demo)
    for event in demo.fns.values():
        if event.fn:
            event.fn = readable_errors(event.fn)
    demo.queue(max_size=32, default_concurrency_limit=4)
    return demo


def look() -> dict:
    """Return theme, style and script as arguments of `launch`; only system fonts, so that the page works offline."""
    theme = gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(  # contrast of at least 4.5:1
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        slider_color="*primary_700", slider_color_dark="*primary_600",
    )  # fmt: skip
    scripts = TOASTS + "".join(f"<script>{path.read_text(encoding='utf-8')}</script>" for path in SCRIPTS)
    return {"theme": theme, "css_paths": [STYLE], "head": scripts}


class Page:
    """The tabs, and the selected run that they share."""

    def __init__(self, parts: Parts) -> None:
        self.library, self.jobs = parts.library, parts.jobs
        with gr.Row(elem_id="top"):
            gr.HTML(TITLE, elem_id="title")
            # It accepts any name, because a run may have begun after the page was loaded.
            self.run = open_choice("Run", elem_id="run", min_width=240)
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
        self.nudge = gr.Button(visible="hidden", elem_id="nudge")  # only clicked by streams.js

    def tab(self, cls: type[T]) -> T:
        """Return the tab of that class."""
        return next(tab for tab in self.tabs if isinstance(tab, cls))

    def events(self, demo: gr.Blocks) -> None:
        """Connect the events of the page and of all tabs."""
        self.blocks = demo
        everything = [self.seen, self.run, self.summary]
        everything += [part for tab in self.tabs for part in (*tab.live, *tab.watched, *tab.of_run)]
        on_arrival = [self.run, *(part for tab in self.tabs for part in tab.on_arrival)]
        # The browser stores run and tab, to restore them when the page is loaded again, for example after a restart.
        demo.load(
            self.arrive, [self.run, self.summary], [*on_arrival, self.all_tabs],
            js=RECALL, preprocess=False, **QUIET,
        )  # fmt: skip
        self.run.change(None, self.run, None, js=STORE % ("run", "run"), **QUIET)
        for tab, frame in self.frames.items():
            frame.select(None, js=STORE % ("tab", f"'{tab.id}'"), **QUIET)
        self.run.change(self.choose, [self.run, self.beside], everything, **QUIET)
        context = [self.run, self.beside, self.seen, *(tab.chosen for tab in self.choosing)]
        # Not queued: if the queue's stream closes, a queued poll is lost, and the page would wait for it forever. Not
        # preprocessed: just after another run is selected, the step may be beyond its last one; Gradio would reject it.
        self.timer.tick(self.watch, context, everything, queue=False, preprocess=False, **QUIET)
        self.nudge.click(lambda: None, **QUIET)
        for tab in self.tabs:
            tab.events(self)

    def arrive(self, run: object = None, tab: object = None) -> dict:
        """Return the page's initial values: the last run and tab, else the run that trains, else the newest run."""
        runs = self.library.runs()
        first = next((name for name, run in runs.items() if run.process), next(iter(runs), None))
        values = {self.run: gr.update(choices=list(runs), value=run if run in list(runs) else first)}
        if tab in [one.id for one in self.tabs]:
            values[self.all_tabs] = gr.Tabs(selected=tab)
        for tab in self.tabs:
            values |= tab.arrive()
        return values

    def choose(self, name: str, beside: list[str] | None):
        """Return all values of the selected run, at its last step."""
        if not name:
            return gr.skip()
        run = self.library.beside(self.library.find(name), beside)
        values = self.shown(run, {tab: tab.choice(run, None, None) for tab in self.choosing})
        for tab in self.tabs:
            values |= tab.filled_in(run)
        return values

    def watch(self, name: str, beside: list[str] | None, seen: tuple | None, *chosen: object):
        """Return the values that changed since the last poll.

        Unchanged selections are not sent, because the user may have changed them since. Nothing is sent before `choose`
        has answered, which sends all values.
        """
        runs = self.library.runs()
        if not name or name not in runs:
            # The user may be typing a name; a shown run that was removed is replaced by the newest.
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
        """Return the state that `watch` compares; if it is unchanged, the page is up to date.

        Its entries are: the states of the tabs, the run names and the run's fingerprint; from index `AT_REST` on, the
        run's status, and the trainer's activity and log.
        """
        seen = tuple(tab.seen(run) for tab in self.tabs)
        at_rest = seen, tuple(self.library.runs()), run.fingerprint()
        return *at_rest, self.jobs.status(run), activity(run.activity), run.log_tail()

    def updates(self, run: Run, status: str) -> dict:
        """Return the values that change with every poll: the summary, and the tabs' `live` components."""
        values = {self.summary: views.summary(run, status, self.jobs.last_line(run))}
        for tab in self.tabs:
            values |= tab.updates(run, status)
        return values

    def shown(self, run: Run, choices: dict[Tab, object]) -> dict:
        """Return the values of all components that `watch` keeps up to date."""
        state = self.state_of(run)  # read first: a change during rendering is found by the next poll
        values = {self.seen: state, self.run: gr.update(choices=list(self.library.runs()))}
        values |= self.updates(run, state[AT_REST])
        for tab in self.tabs:
            values |= tab.shown(run, choices.get(tab))
        return values
