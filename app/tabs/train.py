"""Train: start, watch, stop and resume a training, which is a process of its own."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import gradio as gr

from .. import launcher, views
from ..handlers import named, paths_of, readable_errors
from ..runs import Run
from .base import Parts, Tab

if TYPE_CHECKING:
    from ..page import Page

PARAMETERS = ("name", "images", "caption", "folder", "model", *launcher.FLAGS)
"""Of the named endpoints, in order."""
# The form is kept in the browser, so that it outlives a restart of the server.
KEEP = "(...values) => { localStorage.setItem('reslora-train', JSON.stringify(values)); }"
RECALL = """(...values) => {
    const kept = JSON.parse(localStorage.getItem('reslora-train') || '[]');
    return kept.length === values.length ? kept : values;
}"""


class TrainTab(Tab):
    title, id = "Train", "train"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.flags: dict[str, gr.components.Component] = {}
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                self.settings_column()
            with gr.Column(scale=3, min_width=360):
                self.process_column()
        self.form = [self.name, self.caption, self.folder, self.model, *self.flags.values()]
        self.live, self.on_arrival = [self.log], [self.folder]

    def settings_column(self) -> None:
        self.name = gr.Textbox("my-style", label="Name of the new run", max_lines=1, elem_id="name")
        self.uploads = gr.File(
            label="Your images, with .txt captions if you like (none: the bundled ones)",
            file_count="multiple", file_types=["image", ".txt"], height=150, elem_id="uploads",
        )  # fmt: skip
        self.caption = gr.Textbox(label="Caption of images without a .txt (empty: words of the file name)")
        self.folder = gr.Dropdown(label="Or a folder of images on the server", choices=[], allow_custom_value=True)
        self.model = gr.Textbox(label="Model", placeholder="bundled; or a name on the hub: owner/model", max_lines=1)
        with gr.Row():
            for name, action in launcher.flags().items():
                self.flags[name] = flag_widget(name, action)

    def process_column(self) -> None:
        with gr.Row(elem_classes="actions"):
            self.start = gr.Button("Start training", variant="primary", elem_id="start")
            self.stop = gr.Button("Stop and save", elem_id="stop")
            self.resume = gr.Button("Resume", elem_id="resume")
            self.show = gr.Button("Show command", elem_id="show")
        self.command = gr.Textbox(
            label="Command", lines=2, max_lines=8, buttons=["copy"], interactive=False, elem_id="command"
        )
        self.answer = gr.HTML(elem_id="answer")
        self.log = gr.HTML(elem_id="log")
        gr.Markdown(
            "Training is a process of its own: closing this page does not stop it, and reopening finds it "
            "again. *Stop* lets it save, *Resume* goes on from there. Its images arrive under **Compare**."
        )

    def arrive(self) -> dict:
        """The folders of images on the server."""
        return {self.folder: gr.update(choices=self.trainings.folders())}

    def events(self, page: Page) -> None:
        run = page.run
        inputs = [self.name, self.uploads, self.caption, self.folder, self.model, *self.flags.values()]
        show, start = (named(readable_errors(do), PARAMETERS) for do in (self.do_show, self.do_start))
        self.show.click(show, inputs, self.command, api_name="train_command", preprocess=False)
        self.start.click(start, inputs, [run, self.command], api_name="train_start", preprocess=False)
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        page.blocks.load(None, self.form, self.form, js=RECALL, **quiet)
        gr.on([part.change for part in self.form], None, self.form, None, js=KEEP, **quiet)
        # Not queued: they must not wait for what they end.
        self.stop.click(readable_errors(self.do_stop), run, self.answer, api_name="train_stop", queue=False)
        self.resume.click(readable_errors(self.do_resume), run, self.answer, api_name="train_resume")

    def told(self, run: Run, status: str) -> dict:
        """What the trainer has printed."""
        return {self.log: views.log(self.trainings.log(run), status)}

    def words(self, name, uploads, caption, folder, model, *values) -> list[str]:
        """Of the trainer's command line."""
        settings = dict(zip(launcher.FLAGS, values, strict=True)) | {"model": model}
        return self.trainings.command(name, settings, self.trainings.choose_images(name, folder, paths_of(uploads)))

    def do_show(self, *inputs) -> str:
        """The command that the settings make."""
        return launcher.in_words(self.words(*inputs))

    def do_start(self, *inputs) -> tuple:
        """Starts a training; shows its run, and the command."""
        name, uploads, caption, folder, *_ = inputs
        words, paths = self.words(*inputs), paths_of(uploads)

        def prepare() -> None:
            if paths:
                launcher.store_images(self.trainings.choose_images(name, folder, paths), paths, str(caption or ""))

        run = self.trainings.start(name, words, prepare)
        return gr.update(choices=list(self.library.runs()), value=run.name), launcher.in_words(words)

    def do_stop(self, run: str) -> str:
        """Stops the run that trains, whichever is looked at."""
        return views.notice(self.trainings.stop(run))

    def do_resume(self, run: str) -> str:
        """Goes on with a run."""
        self.trainings.resume(run)
        return views.notice(f"{run} goes on from its newest checkpoint.")


def flag_widget(name: str, action: argparse.Action) -> gr.components.Component:
    """The widget of a trainer's flag, with the trainer's default and help; empty means the default."""
    text, _, rest = action.help.partition(" (")
    info = f"{text} ({rest}" if action.default is None and rest else text
    common = {"label": name, "info": info, "elem_id": f"flag-{name}", "min_width": 220}
    if name == "method":
        value = ["lora", "reslora"]
        return gr.CheckboxGroup(list(action.choices), value=value, **common | {"min_width": 460})
    if action.choices:
        return gr.Dropdown(list(action.choices), value=action.default, **common)
    if name == "validation_prompt":
        return gr.Textbox(lines=2, placeholder="one prompt a line", **common | {"min_width": 460})
    return gr.Textbox("" if action.default is None else str(action.default), max_lines=1, **common)
