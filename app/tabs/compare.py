"""Compare: a slider moves the images of all methods through the training steps together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import gradio as gr

from .. import views
from ..handlers import readable_errors
from ..launcher import safe_name
from ..runs import Run
from .base import Parts, Tab

if TYPE_CHECKING:
    from ..page import Page


class CompareTab(Tab):
    title, id = "Compare", "compare"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.summary = gr.HTML(elem_id="summary")
        with gr.Row(equal_height=True):
            self.step = gr.Slider(0, 1, value=0, step=1, label="Step", elem_id="step", scale=6)
            self.play = gr.Button("▶ Play", elem_id="play", scale=1, min_width=90)
            self.download = gr.Button("Download grid", elem_id="download", scale=1, min_width=120)
            self.grid_file = gr.DownloadButton("grid", visible="hidden", elem_id="grid-file")
        self.playing = gr.Timer(0.8, active=False)
        self.grid = gr.HTML(elem_id="grid")
        with gr.Row(elem_id="curves"):
            self.train_curve = gr.HTML(elem_id="train-curve", min_width=320)
            self.validation_curve = gr.HTML(elem_id="validation-curve", min_width=320)
        self.numbers = gr.HTML(elem_id="numbers")
        self.at_step = [self.grid, self.train_curve, self.validation_curve, self.numbers]
        self.watched = [self.summary, self.step, *self.at_step]
        self.chosen = self.step

    def events(self, page: Page) -> None:
        run = page.run
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        # Not preprocessed: Gradio would refuse a program's step beyond what the slider had when the page was built.
        self.step.change(
            readable_errors(self.compare), [run, self.step], self.at_step, api_name="compare",
            show_progress="hidden", trigger_mode="always_last", preprocess=False,
        )  # fmt: skip
        self.play.click(readable_errors(self.toggle), self.play, [self.play, self.playing], **quiet)
        self.playing.tick(readable_errors(self.next_step), [run, self.step], self.step, **quiet)
        self.download.click(
            readable_errors(self.save_grid),
            [run, self.step],
            self.grid_file,
            api_name="download_grid",
            preprocess=False,
        ).success(None, js="() => document.querySelector('#grid-file').click()", api_visibility="private")

    def seen(self, run: Run) -> int:
        """The last step."""
        return max(run.steps(), default=0)

    def choice(self, run: Run, chosen: float | None, seen: int | None) -> int:
        """A slider at the end moves on with the run."""
        return max(run.steps(), default=0) if (chosen or 0) >= (seen or 0) else run.nearest(chosen)

    def shown(self, run: Run, status: str, step: int) -> dict:
        """Values of all that is watched, at a step."""
        steps = run.steps()
        slider = gr.update(
            minimum=0, maximum=max(steps, default=1) or 1, step=max(1, math.gcd(*steps)) if steps else 1, value=step
        )
        values = zip(self.at_step, self.compare(run.name, step), strict=True)
        return {self.summary: views.summary(run, status), self.step: slider, **dict(values)}

    def compare(self, name: str, step: float) -> tuple:
        """Images, curves and numbers at a step."""
        run = self.library.find(name)
        step = run.nearest(step)
        train, validation = (views.curves(run, split, step) for split in ("train", "validation"))
        return views.comparison(run, step), train, validation, views.numbers(run, step)

    def toggle(self, label: str) -> tuple:
        playing = "Pause" not in label
        return "❚❚ Pause" if playing else "▶ Play", gr.Timer(active=playing)

    def next_step(self, name: str, step: float) -> int:
        steps = self.library.find(name).steps()
        return next((s for s in steps if s > step), steps[0] if steps else 0)

    def save_grid(self, name: str, step: float) -> str:
        """A PNG file of the images at a step."""
        run = self.library.find(name)
        step = run.nearest(step)
        path = self.files.new(f"{safe_name(run.name)}-step-{step}.png")
        views.save_grid(run, step, path)
        return str(path)
