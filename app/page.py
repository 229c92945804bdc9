"""Assemble the page: the run selector, the tabs, and the timer that updates them."""

from pathlib import Path

import gradio as gr

from . import views
from .activity import activity_of
from .handlers import QUIET, Blocks
from .jobs import Jobs
from .library import Library
from .runs import Run
from .studio import Studio
from .tabs import TABS
from .tabs.base import Parts, T, Tab, open_choice

FIRST = "compare"
"""The tab that is open when the page is loaded for the first time."""
EVERY = 2.0
"""Seconds between two polls of the runs folder."""
STYLE, *SCRIPTS = (Path(__file__).with_name(name) for name in ("style.css", "zoom.js"))
# Gradio selects the first tab when the page loads; `recalled` prevents storing that as the user's choice.
STORE = "value => { if (window.recalled) sessionStorage.setItem('reslora-%s', %s ?? ''); }"
RECALL = """() => {
    window.recalled = true;
    return ['run', 'tab'].map(name => sessionStorage.getItem(`reslora-${name}`));
}"""
# Toast messages are outside of the style sheet's scope: place them in a corner, where they cover no button.
TOASTS = "<style>@media (min-width: 641px) { .toast-wrap { top: auto !important; bottom: 16px; } }</style>"
# The name of an option on the command line is its tooltip.
TOOLTIPS = """<script>document.addEventListener("mouseover", event => {
    const part = event.target.closest?.("[id^=flag-]");
    if (part) part.title ||= `--${part.id.slice(5)}`;
});</script>"""
EXPLANATION = (
    "ResLoRA trains LoRA blocks with residual shortcuts between neighboring layers, then merges them away; "
    "what is left is a plain LoRA. All images in a row have the same prompt and seed: only the method differs."
)
TITLE = f"<h1>ResLoRA for Stable Diffusion</h1><details><summary>What is this?</summary><p>{EXPLANATION}</p></details>"


def create_demo(library: Library, jobs: Jobs, studio: Studio) -> gr.Blocks:
    """Return the page as Gradio `Blocks`. Models and runs are only read after the page is opened."""
    with Blocks(
        title="ResLoRA for Stable Diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as demo:
        Page(Parts(library, jobs, studio)).events(demo)
    demo.queue(max_size=32, default_concurrency_limit=4)
    return demo


COLORS = {
    # name: light, dark; contrast of at least 4.5:1
    "background_fill_primary": ("white", "#16181d"),
    "body_background_fill": ("white", "#16181d"),
    "block_background_fill": ("white", "#1d2026"),
    "input_background_fill": ("white", "#14161a"),
    "input_border_color": ("*neutral_300", "#3d424d"),
    "block_border_color": ("*neutral_200", "#343842"),
    "border_color_primary": ("*neutral_300", "#3d424d"),
    "block_title_text_color": ("*neutral_700", "*neutral_200"),
    "block_label_text_color": ("*neutral_700", "*neutral_200"),
    "block_info_text_color": ("*neutral_600", "*neutral_300"),
    "body_text_color_subdued": ("*neutral_600", "*neutral_300"),
    "input_placeholder_color": ("*neutral_500", "*neutral_400"),
    "button_primary_background_fill": ("*primary_700", "*primary_700"),
    "button_primary_background_fill_hover": ("*primary_800", "*primary_800"),
    "button_primary_border_color": ("*primary_700", "*primary_700"),
    "button_primary_text_color": ("white", "white"),
    "button_secondary_background_fill": ("transparent", "transparent"),
    "button_secondary_background_fill_hover": ("*neutral_100", "#2a2e36"),
    "button_secondary_border_color": ("*neutral_300", "#4a505c"),
    "button_secondary_text_color": ("*neutral_800", "*neutral_100"),
    "button_cancel_background_fill": ("transparent", "transparent"),
    "button_cancel_background_fill_hover": ("#fdecea", "#3a2022"),
    "button_cancel_border_color": ("#e0a09a", "#7a3a38"),
    "button_cancel_text_color": ("#b42318", "#ff9b94"),
    "slider_color": ("*primary_700", "*primary_600"),
    "checkbox_background_color_selected": ("*primary_700", "*primary_700"),
    "checkbox_border_color_selected": ("*primary_700", "*primary_700"),
}
"""Gradio theme colors in light and dark mode: one accent color, and red for buttons that delete."""
SIZES = {
    "block_padding": "12px 14px", "block_title_text_weight": "600", "block_label_text_weight": "600",
    "layout_gap": "12px", "block_border_width": "1px", "block_shadow": "none", "input_shadow": "none",
    "input_border_width": "1px",
    "button_border_width": "1px", "button_large_padding": "9px 16px", "button_large_text_size": "*text_md",
    "button_large_text_weight": "600", "button_small_padding": "6px 12px", "button_small_text_weight": "500",
}  # fmt: skip


def look() -> dict:
    """Return the arguments of Gradio's `launch` for theme, style sheet and scripts.

    The theme uses only system fonts, so that the page works offline."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Base(primary_hue="orange", neutral_hue="zinc", radius_size="md", font=sans, font_mono=mono)
    colors = {
        f"{name}{mode}": color for name, both in COLORS.items() for mode, color in zip(("", "_dark"), both, strict=True)
    }
    theme.set(**colors, **SIZES)  # in one call: each call resets some of the colors of the last one
    scripts = TOASTS + TOOLTIPS + "".join(f"<script>{path.read_text(encoding='utf-8')}</script>" for path in SCRIPTS)
    return {"theme": theme, "css_paths": [STYLE], "head": scripts}


class Page:
    """The tabs, and the selected run that they share."""

    def __init__(self, parts: Parts) -> None:
        self.library, self.jobs = parts.library, parts.jobs
        with gr.Row(elem_id="top"):
            gr.HTML(TITLE, elem_id="title")
            # The box of the run accepts any name, because a run may have begun after the page was loaded.
            self.run = open_choice("Run", elem_id="run", min_width=240)
        self.summary = gr.HTML(views.LOADING, elem_id="summary")
        self.tabs: list[Tab] = []
        self.frames: dict[Tab, gr.Tab] = {}
        self.titles: dict[str, gr.Tab] = {}
        with gr.Tabs(selected=FIRST, elem_id="tabs") as self.all_tabs:
            for title, found in TABS.items():
                with gr.Tab(title, id=title.lower()) as frame:
                    self.titles[title.lower()] = frame
                    if isinstance(found, dict):
                        self.make_views(parts, found)
                    else:
                        self.make(parts, frame, found)
        self.choosing = [tab for tab in self.tabs if tab.chosen is not None]
        self.blocks: gr.Blocks
        self.seen = gr.State(None)
        self.timer = gr.Timer(EVERY)

    def make_views(self, parts: Parts, classes: dict[str, type[Tab]]) -> None:
        """Make tabs inside a tab; `classes` has the class of each inner tab by title."""
        with gr.Tabs(elem_id="views") as self.views:
            for title, cls in classes.items():
                with gr.Tab(title, id=title.lower()) as frame:
                    self.make(parts, frame, cls)

    def make(self, parts: Parts, frame: gr.Tab, cls: type[Tab]) -> None:
        """Make a tab inside its Gradio component `frame`."""
        self.tabs.append(cls(parts))
        self.frames[self.tabs[-1]] = frame

    def tab(self, cls: type[T]) -> T:
        """Return the tab that is an instance of this class."""
        return next(tab for tab in self.tabs if isinstance(tab, cls))

    def events(self, demo: gr.Blocks) -> None:
        """Connect the events of the page and of all tabs."""
        self.blocks = demo
        everything = [self.seen, self.run, self.summary]
        everything += [part for tab in self.tabs for part in tab.polled]
        on_arrival = [self.run, *(part for tab in self.tabs for part in tab.on_arrival)]
        # The browser stores run and tab, to restore them when the page is loaded again, for example after a restart.
        demo.load(
            self.arrive, [self.run, self.summary], [*on_arrival, self.all_tabs],
            js=RECALL, preprocess=False, **QUIET,
        )  # fmt: skip
        self.run.change(None, self.run, None, js=STORE % ("run", "value"), **QUIET)
        for name, frame in self.titles.items():
            frame.select(None, js=STORE % ("tab", f"'{name}'"), **QUIET)
        self.run.change(self.choose, self.run, everything, **QUIET)
        context = [self.run, self.seen, *(tab.chosen for tab in self.choosing)]
        # Not queued: if the queue's stream closes, a queued poll is lost, and the page would wait for it forever. Not
        # preprocessed: just after another run is selected, the step may be beyond its last one; Gradio would reject it.
        self.timer.tick(self.watch, context, everything, queue=False, preprocess=False, **QUIET)
        for tab in self.tabs:
            tab.events(self)

    def arrive(self, run: object = None, tab: object = None) -> dict:
        """Return the page's initial values by component.

        `run` and `tab`: the browser's last selection. Without a valid run, select the training run, else the newest."""
        runs = self.library.runs()
        first = next((name for name, run in runs.items() if run.process), next(iter(runs), None))
        values = {self.run: gr.update(choices=list(runs), value=run if run in list(runs) else first)}
        if isinstance(tab, str) and tab in self.titles:
            values[self.all_tabs] = gr.Tabs(selected=tab)
        for tab in self.tabs:
            values |= tab.arrive()
        return values

    def choose(self, name: str):
        """Return the values of all components for the newly selected run, at the run's last step."""
        if not name:
            return gr.skip()
        run = self.library.find(name)
        values = self.shown(run, {tab: tab.choice(run, None, None) for tab in self.choosing})
        for tab in self.tabs:
            values |= tab.filled_in(run)
        return values

    def watch(self, name: str, seen: tuple | None, *chosen: object):
        """Return the values that have changed since the last poll, by component.

        `seen`: the state at the last poll. `chosen`: current values of the tabs' components `chosen`.

        Unchanged selections are not sent, because the user may have changed them in the meantime.
        """
        runs = self.library.runs()
        states, names, _ = seen[0] if seen else ((None,) * len(self.tabs), (), ())
        if not name or name not in runs:
            # The user may be typing a name; a shown run that was removed is replaced by the newest.
            gone = name in names
            first = {"value": next(iter(runs), None)} if gone else {}
            return {self.run: gr.update(choices=list(runs), **first)} if gone or (runs and seen is None) else gr.skip()
        run = runs[name]
        state = self.state_of(run)
        if seen and state[0] == seen[0]:
            return {self.seen: state} | self.updates(run) if state != seen else gr.skip()
        before = dict(zip(self.tabs, states, strict=True))
        was = dict(zip(self.choosing, chosen, strict=True))
        choices = {tab: tab.choice(run, was[tab], before[tab]) for tab in self.choosing}
        updates = self.shown(run, choices)
        for tab, choice in choices.items():
            if choice == was[tab] or not seen:
                del updates[tab.chosen]["value"]
        for tab in self.tabs:
            if tab.is_outdated(run, before[tab]):
                updates |= tab.filled_in(run)
        return updates

    def state_of(self, run: Run) -> tuple:
        """Return the state that `watch` compares with the state at the last poll to find out what has changed.

        The first entry has the states of the tabs, the run names and the run's fingerprint; if it changes, all
        components are updated. If only the second entry changes (status, activity, log), `updates` is enough.
        """
        states = tuple(tab.seen(run) for tab in self.tabs)
        now = tuple(tab.live_state(run) for tab in self.tabs)
        return (
            (states, tuple(self.library.runs()), run.fingerprint()),
            (self.jobs.status(run), activity_of(run), run.log_tail(), now),
        )

    def updates(self, run: Run) -> dict:
        """Return the values that may change at every poll: the summary, and those of the tabs."""
        status = self.jobs.status(run)
        values = {self.summary: views.summary(run, status, self.jobs.last_line(run))}
        for tab in self.tabs:
            values |= tab.updates(run, status)
        return values

    def shown(self, run: Run, choices: dict[Tab, object]) -> dict:
        """Return the values of all components that `watch` updates; `choices`: the new value of each tab's `chosen`."""
        state = self.state_of(run)  # read first: a change during rendering is found by the next poll
        values = {self.seen: state, self.run: gr.update(choices=list(self.library.runs()))}
        values |= self.updates(run)
        for tab in self.tabs:
            values |= tab.shown(run, choices.get(tab))
        return values
