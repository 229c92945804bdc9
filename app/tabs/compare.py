"""Part of Compare: samples and losses of a run's methods, at a training step set by a slider."""

import math
import time

import gradio as gr

from reslora.methods.registry import METHODS

from .. import compared, downloads, views
from ..handlers import NO_PROGRESS, QUIET
from ..launcher import safe_name
from ..runs import Run
from ..verdict import verdict
from .base import Parts, Tab, TabHost, download, open_choice


class CompareTab(Tab):
    """The tab that compares the methods of a run."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row(equal_height=True, elem_id="pinned"):
            self.step = gr.Slider(0, 1, value=0, step=1, label="Step", elem_id="step", scale=6)
            self.play = gr.Button("▶ Play", elem_id="play", scale=1, min_width=90)
            self.download = gr.Button("Download grid", elem_id="download", scale=1, min_width=120)
        self.playing = gr.Timer(0.8, active=False)
        self.verdict = gr.HTML(elem_id="verdict")
        with gr.Row(elem_id="beside"):
            with gr.Column(scale=3):
                self.grid = gr.HTML(views.LOADING, elem_id="grid")
            with gr.Column(scale=2, elem_id="curves"):
                self.train_curve = gr.HTML(elem_id="train-curve")
                self.validation_curve = gr.HTML(elem_id="validation-curve")
        self.numbers = gr.HTML(elem_id="numbers")
        with gr.Column(elem_id="swipe-part", visible=False) as self.swipe_part:
            with gr.Row():
                self.left, self.right, self.row = (
                    gr.Dropdown(label=label, elem_id=name, min_width=140)
                    for label, name in (("Swipe from", "left"), ("to", "right"), ("Prompt", "swipe-row"))
                )
            with gr.Row():
                self.swipe = gr.ImageSlider(
                    label="Swipe", show_label=False, format="png", max_height=512, min_width=320,
                    elem_id="swipe",
                    buttons=["fullscreen"], interactive=False,
                )  # fmt: skip
                self.difference = gr.Image(
                    label="Difference", format="png", height=512, min_width=320, elem_id="difference",
                    buttons=["fullscreen"],
                    interactive=False,
                )  # fmt: skip
        gr.Markdown("### Download")
        with gr.Row(elem_id="take-row"):
            self.file = open_choice("File", elem_id="file", scale=4)
            self.take = gr.Button("Download", variant="primary", elem_id="take", scale=1, min_width=120)
        common = {"interactive": False, "buttons": ["copy"]}
        self.place = gr.Textbox(label="Path", max_lines=1, elem_id="place", **common)
        self.use = gr.Textbox(label="Load it with", lines=3, max_lines=8, elem_id="use", **common)
        self.at_step = [self.grid, self.train_curve, self.validation_curve, self.numbers, self.verdict]
        # Holds the time of the last change. This event does not set the step, because the user may have moved the
        # slider.
        self.new = gr.Textbox(visible="hidden", elem_id="new")
        self.polled = [self.step, self.new, self.file, self.place, self.use]
        self.chosen = self.step

    def events(self, page: TabHost) -> None:
        """Connect the slider, the buttons and the endpoints."""
        run, looked_at = page.run, [page.run, self.step]
        # Not preprocessed: Gradio would reject a step beyond the slider's previous maximum.
        gr.on(
            [self.step.change, self.new.change], self.compare, looked_at, self.at_step, trigger_mode="always_last",
            api_name="compare", preprocess=False, **NO_PROGRESS,
        )  # fmt: skip
        two = [self.left, self.right, self.row]
        gr.on(
            [self.grid.change, *(part.input for part in two)], self.look_at_two, [*looked_at, *two],
            [self.swipe_part, *two, self.swipe, self.difference], trigger_mode="always_last", preprocess=False, **QUIET,
        )  # fmt: skip
        self.play.click(self.toggle, self.play, [self.play, self.playing], **QUIET)
        self.playing.tick(self.next_step, [run, self.step], self.step, preprocess=False, **QUIET)
        download(self.download, self.save_grid, looked_at, "download_grid")
        self.file.change(
            self.how_to_use, [run, self.file], [self.place, self.use], api_name="how_to_use",
            preprocess=False, **NO_PROGRESS,
        )  # fmt: skip
        download(self.take, self.take_file, [run, self.file], "download_file")

    def seen(self, run: Run) -> tuple:
        """Return the last step with samples, the downloads, and whether the run has failed."""
        return max(run.steps(), default=0), self.list_files(run), self.jobs.status(run) == "failed"

    def choice(self, run: Run, chosen: float | None, seen: tuple | None) -> int:
        """Return the new step of the slider; if it was at the run's last step, it follows the last step."""
        last = seen[0] if seen else 0
        return max(run.steps(), default=0) if (chosen or 0) >= last else run.nearest(chosen)

    def is_outdated(self, run: Run, seen: tuple | None) -> bool:
        """Return whether the list of downloads has changed."""
        return seen is not None and seen[1] != self.list_files(run)

    def filled_in(self, run: Run) -> dict:
        """Return the downloads, with the last method's first LoRA file selected."""
        labels = self.list_files(run)
        mine = [label for label in labels if label.startswith(f"{METHODS[run.methods[-1]].title}:")]
        chosen = next((label for label in mine if ".safetensors" in label), next(iter(mine or labels), None))
        place, use = self.how_to_use(run.name, chosen)
        title = "File" if labels else "File (there are none yet: they are written when a method has been trained)"
        file = gr.update(choices=labels, value=chosen, label=title)
        return {self.file: file, self.place: place, self.use: use}

    def shown(self, run: Run, step: int) -> dict:
        """Return the slider's new range, and its new step, by component."""
        steps = run.steps()
        slider = gr.update(
            minimum=0, maximum=max(steps, default=1) or 1, step=max(1, math.gcd(*steps)) if steps else 1, value=step
        )
        return {self.step: slider, self.new: str(time.time_ns())}

    def compare(self, name: str, step: float) -> tuple:
        """Return samples, two charts of losses, numbers and verdict at a step, as HTML."""
        run = self.library.find(name)
        step = run.nearest(step)
        train, validation = (compared.curves(run, split, step) for split in ("train", "validation"))
        shown = compared.images(run, step, self.jobs.status(run))
        return shown, train, validation, compared.numbers(run, step), verdict(run, step)

    def look_at_two(self, name: str, step: float, *chosen: object) -> dict:
        """Return the new values of the swipe between two images of the grid, and of their difference, by component.

        `chosen`: the titles of two columns, and a prompt. Titles that do not exist become the first and the last
        column; a prompt that does not exist becomes the first prompt.
        """
        run = self.library.find(name)
        columns, rows = compared.choices(run, run.nearest(step))
        if len(columns) < 2:
            return {self.swipe_part: gr.update(visible=False)}
        wanted = zip(chosen, (columns, columns, rows), (0, -1, 0), strict=True)
        left, right, row = (one if one in known else list(known)[place] for one, known, place in wanted)
        images = compared.two_images(columns[left], columns[right], rows[row])
        picture, caption = compared.difference(*images) if images else (None, "Difference")
        return {
            self.swipe_part: gr.update(visible=True), self.swipe: images,
            self.left: gr.update(choices=list(columns), value=left),
            self.right: gr.update(choices=list(columns), value=right),
            self.row: gr.update(choices=list(rows), value=row),
            self.difference: gr.update(value=picture, label=caption),
        }  # fmt: skip

    def list_files(self, run: Run) -> list[str]:
        """Return the labels of a run's downloads."""
        return [one.label for one in downloads.downloads_of(run)]

    def how_to_use(self, name: str, label: str) -> tuple[str, str]:
        """Return the path of a download and how to load it; both are empty if no download is selected."""
        if not label:
            return "", ""
        one = downloads.find(self.library.find(name), label)
        return one.place, one.use

    def take_file(self, name: str, label: str) -> str:
        """Return the path of a copy of the run's download with this label."""
        run = self.library.find(name)
        return str(downloads.packed(run, downloads.find(run, label)))

    def toggle(self, label: str) -> tuple:
        """Start or pause the animation of the slider; return the button's new label and the timer.

        `label`: the button's current label."""
        playing = "Pause" not in label
        return "❚❚ Pause" if playing else "▶ Play", gr.Timer(active=playing)

    def next_step(self, name: str, step: float) -> int:
        """Return the next step with samples; after the last step, return the first."""
        steps = self.library.find(name).steps()
        return next((s for s in steps if s > step), steps[0] if steps else 0)

    def save_grid(self, name: str, step: float) -> str:
        """Return the path of a PNG file with the grid of samples at a step."""
        run = self.library.find(name)
        step = run.nearest(step)
        path = downloads.new_file(f"{safe_name(run.name)}-step-{step}.png")
        compared.save_grid(run, step, path)
        return str(path)
