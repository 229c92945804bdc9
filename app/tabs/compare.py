"""Compare: a slider moves the images of all methods through the training steps together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import gradio as gr

from .. import takeaway, views
from ..handlers import readable_errors
from ..launcher import safe_name
from ..runs import Run
from ..verdict import verdict
from .base import Parts, Tab

if TYPE_CHECKING:
    from ..page import Page


class CompareTab(Tab):
    title, id = "Compare", "compare"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row(equal_height=True, elem_id="pinned"):
            self.step = gr.Slider(0, 1, value=0, step=1, label="Step", elem_id="step", scale=6)
            self.play = gr.Button("▶ Play", elem_id="play", scale=1, min_width=90)
            self.download = gr.Button("Download grid", elem_id="download", scale=1, min_width=120)
            self.grid_file = gr.DownloadButton("grid", visible="hidden", elem_id="grid-file")
        self.playing = gr.Timer(0.8, active=False)
        self.verdict = gr.HTML(elem_id="verdict")
        with gr.Row(elem_id="beside"):
            with gr.Column(scale=3, min_width=320):
                self.grid = gr.HTML(elem_id="grid")
            with gr.Column(scale=2, min_width=320, elem_id="curves"):
                self.train_curve = gr.HTML(elem_id="train-curve")
                self.validation_curve = gr.HTML(elem_id="validation-curve")
        self.numbers = gr.HTML(elem_id="numbers")
        self.files_column()
        self.at_step = [self.grid, self.train_curve, self.validation_curve, self.numbers, self.verdict]
        self.watched, self.of_run = [self.step, *self.at_step], [self.file, self.place, self.use]
        self.chosen = self.step

    def files_column(self) -> None:
        """What the run has made, and how to load it elsewhere."""
        gr.Markdown("### Use it elsewhere")
        with gr.Row(equal_height=True):
            self.file = gr.Dropdown(label="File", allow_custom_value=True, interactive=True, elem_id="file", scale=4)
            self.take = gr.Button("Download", elem_id="take", scale=1, min_width=120)
            self.taken = gr.DownloadButton("taken", visible="hidden", elem_id="taken")
        common = {"interactive": False, "buttons": ["copy"]}
        self.place = gr.Textbox(label="Where it is", max_lines=1, elem_id="place", **common)
        self.use = gr.Textbox(label="How it is loaded", lines=3, max_lines=8, elem_id="use", **common)

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
        self.file.change(
            readable_errors(self.how_to_use), [run, self.file], [self.place, self.use], api_name="how_to_use",
            show_progress="hidden", preprocess=False,
        )  # fmt: skip
        self.take.click(
            readable_errors(self.take_file), [run, self.file], self.taken, api_name="download_file", preprocess=False
        ).success(None, js="() => document.querySelector('#taken').click()", api_visibility="private")

    def seen(self, run: Run) -> tuple[int, list[str]]:
        """The last step, and what there is to take along."""
        return max(run.steps(), default=0), self.list_files(run)

    def choice(self, run: Run, chosen: float | None, seen: tuple[int, list[str]] | None) -> int:
        """A slider at the end moves on with the run."""
        last = seen[0] if seen else 0
        return max(run.steps(), default=0) if (chosen or 0) >= last else run.nearest(chosen)

    def is_outdated(self, run: Run, seen: tuple[int, list[str]] | None) -> bool:
        """Once there are other files."""
        return seen is not None and seen[1] != self.list_files(run)

    def filled_in(self, run: Run) -> dict:
        """The files, with the last method's first one chosen."""
        labels = self.list_files(run)
        mine = [label for label in labels if label.startswith(f"{run.methods[-1]}:")] if labels else []
        chosen = next(iter(mine), next(iter(labels), None))
        place, use = self.how_to_use(run.name, chosen) if chosen else ("", "")
        title = "File" if labels else "File (there are none yet: they are written when a method has been trained)"
        return {self.file: gr.update(choices=labels, value=chosen, label=title), self.place: place, self.use: use}

    def shown(self, run: Run, step: int) -> dict:
        """Values of all that is watched, at a step."""
        steps = run.steps()
        slider = gr.update(
            minimum=0, maximum=max(steps, default=1) or 1, step=max(1, math.gcd(*steps)) if steps else 1, value=step
        )
        values = zip(self.at_step, self.compare(run.name, step), strict=True)
        return {self.step: slider, **dict(values)}

    def compare(self, name: str, step: float) -> tuple:
        """Images, curves and numbers at a step."""
        run = self.library.find(name)
        step = run.nearest(step)
        train, validation = (views.curves(run, split, step) for split in ("train", "validation"))
        return views.comparison(run, step), train, validation, views.numbers(run, step), verdict(run, step)

    def list_files(self, run: Run) -> list[str]:
        """What can be taken along."""
        return [one.label for one in takeaway.takeaways(self.library, run)]

    def how_to_use(self, name: str, label: str) -> tuple[str, str]:
        """Where a file is, and how it is loaded; nothing where none is chosen, as of a run that has none."""
        if not label:
            return "", ""
        one = takeaway.find(self.library, self.library.find(name), label)
        return one.place, one.use

    def take_file(self, name: str, label: str) -> str:
        """A copy of a file that the run has made, to download."""
        run = self.library.find(name)
        return str(takeaway.packed(run, takeaway.find(self.library, run, label), self.files))

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
