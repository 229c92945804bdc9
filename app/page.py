"""The page: a run to choose, four tabs over it, and what keeps them up to date."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from .listeners import Listeners
from .polite import polite
from .runs import Library, Run
from .studio import Studio
from .tabs.chains import ChainsTab
from .tabs.compare import CompareTab
from .tabs.generate import GenerateTab
from .tabs.train import TrainTab
from .training import Trainings
from .working import WorkingFiles

EVERY = 2.0
"""Seconds between two looks at the runs folder."""
STYLE = Path(__file__).with_name("style.css")
EXPLANATION = (
    "**ResLoRA** trains LoRA blocks with residual shortcuts between neighbouring layers, then merges them away; "
    "what is left is a plain LoRA. All images in a row have the same caption and seed: only the method differs."
)


def create_demo(library: Library, trainings: Trainings, studio: Studio, listeners: Listeners) -> gr.Blocks:
    """The page as Gradio blocks; nothing is loaded or read before somebody looks at it."""
    with gr.Blocks(
        title="ResLoRA for Stable Diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as demo:
        Page(library, trainings, studio, listeners).events(demo)
    demo.queue(max_size=32, default_concurrency_limit=4)
    return demo


def look() -> dict:
    """Theme and style, as `launch` takes them; system fonts only, so that the page works offline."""
    theme = gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {"theme": theme, "css_paths": [STYLE]}


class Page:
    """The tabs, and what they have in common: the run."""

    def __init__(self, library: Library, trainings: Trainings, studio: Studio, listeners: Listeners) -> None:
        self.library, self.trainings = library, trainings
        files = WorkingFiles()
        with gr.Row(elem_id="top"):
            gr.Markdown(f"# ResLoRA for Stable Diffusion\n{EXPLANATION}", elem_id="title")
            # Any value may be sent, so that runs begun meanwhile can be; the library decides whether there is one.
            self.run = gr.Dropdown(label="Run", allow_custom_value=True, interactive=True, elem_id="run", min_width=240)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                self.compare = CompareTab(library, files)
            with gr.Tab("Generate", id="generate"):
                self.generate = GenerateTab(library, studio, files, listeners)
            with gr.Tab("Train", id="train"):
                self.train = TrainTab(library, trainings)
            with gr.Tab("Chains and merge", id="chains"):
                self.chains = ChainsTab(library, studio)
        self.seen = gr.State(None)
        self.timer = gr.Timer(EVERY)

    def events(self, demo: gr.Blocks) -> None:
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        everything = [self.seen, self.run, *self.compare.watched, *self.generate.watched, *self.chains.watched]
        everything += [*self.train.watched, *self.generate.of_run, *self.chains.of_run]
        demo.load(polite(self.arrive), None, [self.run, self.train.folder], **quiet)
        self.run.change(polite(self.choose), self.run, everything, **quiet)
        context = [self.run, self.compare.step, self.seen, self.generate.weights, self.chains.checkpoint]
        # Not queued: a look that is lost with its queue's stream would be waited for, and the page would stand still.
        self.timer.tick(polite(self.watch), context, everything, queue=False, **quiet)
        self.compare.events(self.run)
        self.generate.events(self.run)
        self.train.events(self.run)
        self.chains.events(self.run, self.generate.weights)
        gr.api(polite(self.list_runs), api_name="runs")

    def list_runs(self) -> list[str]:
        """Names of the runs, the newest first."""
        return list(self.library.runs())

    def arrive(self) -> tuple:
        """Somebody opens the page: the run that is training, else the newest."""
        runs = self.library.runs()
        first = next((name for name, run in runs.items() if run.process), next(iter(runs), None))
        return gr.update(choices=list(runs), value=first), gr.update(choices=self.trainings.folders())

    def choose(self, name: str):
        """Everything that is seen of a run, at its last step."""
        if not name:
            return gr.skip()
        run = self.library.find(name)
        seen = self.shown(run, max(run.steps(), default=0), run.best_weights())
        return {**seen, **self.generate.settings_of(run), **self.chains.results_of(run)}

    def watch(self, name: str, step: float, seen: tuple | None, label: str, checkpoint: str | None):
        """What has changed since the last look; a slider at the end moves on with the run.

        What stays as chosen is not sent: somebody may have chosen anew since.
        """
        runs = self.library.runs()
        if not name or name not in runs:
            return {self.run: gr.update(choices=list(runs))} if runs and seen is None else gr.skip()
        run = runs[name]
        if self.state_of(run) == seen:
            return gr.skip()
        step = step or 0
        labels = self.generate.list_weights(name)
        last_step, had_settings, results, *_, best = seen or (0, True, None, label)
        to_step = max(run.steps(), default=0) if step >= last_step else run.nearest(step)
        to_label = label if label != best and label in labels else run.best_weights()
        updates = self.shown(run, to_step, to_label)
        for component, stays in (
            (self.compare.step, to_step == step),
            (self.generate.weights, to_label == label),
            (self.chains.checkpoint, checkpoint in (w.label for w in run.checkpoints("reslora"))),
        ):
            if stays:
                del updates[component]["value"]
        settings = self.generate.settings_of(run) if not had_settings and run.config else {}
        merges = self.chains.results_of(run) if results != run.results() else {}
        return {**updates, **settings, **merges}

    def state_of(self, run: Run) -> tuple:
        """What `watch` compares: when it is the same, the page is up to date."""
        state = run.fingerprint(), self.trainings.status(run), tuple(self.library.runs()), run.log_tail()
        return max(run.steps(), default=0), bool(run.config), run.results(), *state, run.best_weights()

    def shown(self, run: Run, step: int, label: str) -> dict:
        """Values of the components that `watch` keeps up to date."""
        status = self.trainings.status(run)
        return {
            self.seen: self.state_of(run),
            self.run: gr.update(choices=list(self.library.runs())),
            **self.compare.shown(run, status, step),
            **self.generate.shown(run, label),
            **self.chains.shown(run),
            **self.train.shown(run, status),
        }
