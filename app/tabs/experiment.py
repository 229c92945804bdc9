"""Experiment: find the method that works best on the user's images. The report grows with each run."""

from typing import ClassVar

import gradio as gr

from .. import experiments, launcher, views
from ..downloads import Download, packed
from ..handlers import QUIET, paths_of
from ..library import Experiment
from ..runs import RunError
from .base import Parts, TabHost, open_choice
from .launching import LaunchTab

EVERY = 3.0
"""Seconds between two polls of the experiment."""
ABOUT = (
    "The first seed trains every method with every learning rate, on the same images and noise. Images that are not "
    "trained on choose each method's learning rate and checkpoint, and the other seeds train at that rate. Methods are "
    "compared on other images, read once at the end. The name of an experiment that is there resumes it: what is new "
    "among methods, rates and seeds is added, and all else has to be as it was, or empty."
)


class ExperimentTab(LaunchTab):
    """The tab that starts experiments and shows their reports."""

    title, id = "Experiment", "experiment"
    kind, suggested = Experiment, "which-method"
    names = (
        "method", "learning_rate", "seed", "shortcut", "pre_num", "head", "merge", "rank", "max_train_steps",
        "train_batch_size", "resolution", "test_split", "experiment_minutes", "validation_prompt", "extend_rates",
    )  # fmt: skip
    left_out = ("validation_split", "max_train_samples", "save_best", "early_stopping_patience", "validation_noises")
    filled: ClassVar = {
        "method": ["lora", "lora_x2", "reslora"], "learning_rate": "1e-4 3e-4 1e-3", "seed": "0 1 2",
        "shortcut": ["input"], "max_train_steps": 200,
    }  # fmt: skip
    buttons = ("Start experiment", "Stop and save", "Go on", "Show command")

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                gr.Markdown(ABOUT)
                self.settings_column()
            with gr.Column(scale=3, min_width=360):
                self.plan = gr.HTML(elem_id="experiment-plan")
                self.buttons_row()
                self.memory_button()
                with gr.Row(equal_height=True):
                    self.which = open_choice("Experiment", elem_id="experiment", scale=3)
                    self.take = gr.DownloadButton(
                        "Download report", interactive=False, elem_id="take-report", scale=1, min_width=140
                    )
                    self.take_best = gr.Button(
                        "Download best LoRA", interactive=False, elem_id="take-best", scale=1, min_width=140
                    )
                    self.best_taken = gr.DownloadButton("best", visible="hidden", elem_id="best-taken")
                self.state = gr.HTML(elem_id="experiment-state")
                self.report = gr.HTML(elem_id="experiment-report")
                with gr.Accordion("What the trainer prints", open=False):
                    self.log = gr.HTML(elem_id="experiment-log")
        self.last_look = gr.State(None)
        self.timer = gr.Timer(EVERY, active=False)
        self.on_arrival += [self.which]

    def arrive(self) -> dict:
        """Return the image folders and the experiments; select the experiment that is training, else the newest."""
        found = self.library.experiments()
        first = next((name for name, one in found.items() if one.process), next(iter(found), None))
        return super().arrive() | {self.which: gr.update(choices=list(found), value=first)}

    def list_names(self) -> list[str]:
        """Return the names of the experiments, newest first."""
        return list(self.library.experiments())

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        self.connect(page, self.which, self.last_look)
        planned = [self.name, self.uploads, self.folder, self.model, *self.flags.values()]
        gr.on(
            [page.frames[self].select, *(part.change for part in planned)],
            self.count, planned, self.plan, trigger_mode="always_last", queue=False,
            preprocess=False, **QUIET,
        )  # fmt: skip
        shown = [self.last_look, self.which, self.state, self.log, self.report, self.take, self.take_best]
        self.take_best.click(
            self.copy_of_best, self.which, self.best_taken, api_name="download_best", preprocess=False
        ).success(None, js="() => document.querySelector('#best-taken').click()")
        self.which.change(self.look, self.which, shown, **QUIET)
        self.timer.tick(self.look, [self.which, self.last_look], shown, queue=False, **QUIET)
        page.frames[self].select(lambda: gr.Timer(active=True), None, self.timer, **QUIET)

    def count(self, name: str, uploads, folder: str, model: str, *values) -> str:
        """Return the number of arms of the form, or what is wrong with it."""
        settings = self.settings(values) | {"model": model}
        return experiments.plan(self.jobs, name, settings, folder, paths_of(uploads))

    def look(self, name: str, seen: tuple | None = None):
        """Return the values that changed since the last poll: state and log, and the report if it changed."""
        names = self.list_names()
        if name not in names:
            # The user may be typing a name; without a selection, or if it was removed, select the newest.
            gone = not name or (seen is not None and name == seen[0])
            return {self.which: gr.update(choices=names, value=names[0])} if names and gone else gr.skip()
        found = self.library.find_experiment(name)
        status = self.jobs.status(found)
        now = (name, tuple(names), found.fingerprint(), status, found.activity, found.log_tail())
        if now == seen:
            return gr.skip()
        updates = {
            self.last_look: now,
            self.state: experiments.summary(found, status, self.jobs.last_line(found)),
            self.log: views.log(self.jobs.log(found), status),
        }
        if seen is None or now[:3] != seen[:3]:
            updates[self.which] = gr.update(choices=names)
            updates[self.report] = experiments.report(found)
            updates[self.take] = gr.update(value=self.copy_of_report(found), interactive=bool(found.report()))
            updates[self.take_best] = gr.update(interactive=found.lora() is not None)
        return updates

    def copy_of_report(self, experiment: Experiment) -> str | None:
        """Return a copy of the report to download, or None until there is one."""
        content = experiment.report()
        if not content:
            return None
        path = self.files.new(f"{launcher.safe_name(experiment.name)}-report.html")
        path.write_text(content, encoding="utf-8")
        return str(path)

    def copy_of_best(self, name: str) -> str:
        """Return a copy of the best arm's LoRA file to download. Raises `RunError` until there is one."""
        found = self.library.find_experiment(name)
        path = found.lora()
        if path is None:
            raise RunError(
                "There is no LoRA file: it comes when arms are compared, and none with DoRA, LoHa, LoKr and OFT."
            )
        return str(packed(found, Download("best", path, (path,), "", ""), self.files))
