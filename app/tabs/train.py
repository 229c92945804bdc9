"""Train: start, watch, stop and resume a training, which runs as a separate process."""

from functools import partial
from typing import ClassVar

import gradio as gr

from reslora.images.experiment.requirements import OF_EXPERIMENTS
from reslora.training.stopping import SAMPLE, SAVE

from .. import form, views
from ..bases import word_of_model
from ..handlers import NO_PROGRESS, QUIET
from ..library import VARYING
from ..runs import Run, RunError
from .base import Parts, TabHost, open_choice
from .launching import LaunchTab


class TrainTab(LaunchTab):
    """The tab that starts runs."""

    title, id = "Train", "train"
    suggested = "my-style"
    names = (
        "method", "learning_rate", "max_train_steps", "train_batch_size", "rank", "resolution", "seed", "shortcut",
        "pre_num", "head", "merge", "validation_prompt", "validation_steps", "checkpointing_steps",
    )  # fmt: skip
    left_out = OF_EXPERIMENTS
    filled: ClassVar = {"method": ["lora", "reslora"]}

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                self.begin = open_choice(
                    "Begin with the settings of", choices=list(form.PRESETS), value=next(iter(form.PRESETS)),
                    elem_id="begin",
                )  # fmt: skip
                self.begun = gr.State(None)
                self.settings_column()
            with gr.Column(scale=3, min_width=360):
                self.buttons_row()
                with gr.Row():
                    self.sample_now = gr.Button("Sample now", elem_id="sample-now", size="sm")
                    self.save_now = gr.Button("Save now", elem_id="save-now", size="sm")
                    self.memory_button()
                self.log = gr.HTML(elem_id="log")
                gr.Markdown(
                    "Training is a process of its own: closing this page does not stop it, and reopening finds it "
                    "again. *Stop* lets it save, *Resume* goes on from there. Its images arrive under **Compare**."
                )
        self.live = [self.log]
        self.on_arrival += [self.begin]

    def arrive(self) -> dict:
        """Return the image folders, and the presets and runs whose settings can be loaded."""
        return super().arrive() | {self.begin: gr.update(choices=[*form.PRESETS, *self.library.runs()])}

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        self.connect(page, page.run, page.seen)
        # Not `input`: it is also triggered when the box loses the focus, and would overwrite the form. `select` is
        # triggered by each selection with the mouse, also of the same item. After it, `change` is triggered if another
        # item was selected, with the mouse or with keys.
        filled = [self.begun, self.model, self.folder, *self.flags.values()]
        in_turn = {"trigger_mode": "always_last", "concurrency_id": "begin", "concurrency_limit": 1, **QUIET}
        self.begin.select(self.fill_by_mouse, self.begin, filled, **in_turn)
        self.begin.change(self.fill_once, [self.begin, self.begun], filled, **in_turn)
        for button, request in ((self.sample_now, SAMPLE), (self.save_now, SAVE)):
            named = f"train_{request.replace('.', '_')}"
            button.click(
                partial(self.ask, request), None, self.answer, api_name=named, concurrency_limit=None, **NO_PROGRESS
            )

    def fill(self, name: str) -> list:
        """Return the form with the settings of a preset, or of a run with its images.

        Raises `RunError` if the page cannot name the run's model.
        """
        runs = self.library.runs()
        settings = form.settings_of(name, runs)
        folder = gr.update() if name in form.PRESETS else self.jobs.images.of_run(runs[name])
        return [word_of_model(name, settings), folder, *form.values_of(settings, self.all_names())]

    def fill_by_mouse(self, name: str) -> list:
        """Return the name of the selected preset or run, and the form."""
        return [name, *self.fill(name)]

    def fill_once(self, name: str, begun: str | None) -> list | dict:
        """Return the form, unless `select` has already set it: values typed since are not overwritten."""
        return {self.begun: None} if name == begun else [None, *self.fill(name)]

    def ask(self, request: str) -> str:
        """Request a checkpoint or samples from the active run after this step."""
        return views.notice(self.jobs.ask(request))

    def settings(self, values: tuple) -> dict:
        """Return the options and their values. Raises `RunError` if an option has several values, as in experiments."""
        settings = super().settings(values)
        for name in VARYING:
            value = settings.get(name)
            if isinstance(value, str) and len(value.replace(",", " ").split()) > 1:
                raise RunError(f"{name} {value}: several values make an experiment; start it under Experiment.")
        return settings

    def updates(self, run: Run, status: str) -> dict:
        """Return the trainer's output."""
        return {self.log: views.log(self.jobs.log(run), status)}
