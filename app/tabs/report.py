"""Part of Compare: progress, report and downloads of an experiment. The report is updated after each run."""

import gradio as gr

from .. import experiments, launcher, views
from ..downloads import Download, new_file, packed
from ..handlers import QUIET
from ..library import Experiment
from ..runs import RunError
from .base import Parts, TabHost, answer_line, download, open_choice
from .control import ControlTab

EVERY = 3.0
"""Seconds between two polls of the selected experiment."""
RESIZE = """
window.addEventListener('message', event => {
    const frame = element.querySelector('iframe');
    const height = Number(event.data?.reportHeight);
    if (event.source === frame?.contentWindow && height > 0) frame.style.height = `${Math.min(height, 50000)}px`;
});
"""
"""Script that gives the report's frame the height of its content, so that only the page scrolls."""


class ReportTab(ControlTab):
    """The part that shows the report of an experiment."""

    kind = Experiment

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row(elem_id="which-experiment"):
            self.which = open_choice("Experiment", elem_id="experiment", scale=3)
            self.stop = gr.Button("Stop and save", elem_id="experiment-stop", min_width=110)
            self.resume = gr.Button("Resume", elem_id="experiment-resume", min_width=90)
            self.take = gr.DownloadButton("Download report", interactive=False, elem_id="take-report", min_width=140)
            self.take_best = gr.Button("Download best LoRA", interactive=False, elem_id="take-best", min_width=140)
        self.answer = answer_line(elem_id="experiment-answer")
        self.state = gr.HTML(elem_id="experiment-state")
        self.report = gr.HTML(views.LOADING, elem_id="experiment-report", js_on_load=RESIZE)
        with gr.Accordion("Log of the trainer", open=False):
            self.log = gr.HTML(elem_id="experiment-log")
        self.last_look = gr.State(None)
        self.timer = gr.Timer(EVERY, active=False)
        self.on_arrival = [self.which]

    def arrive(self) -> dict:
        """Return the update of the list of experiments, which selects the training experiment, else the newest."""
        found = self.library.experiments()
        first = next((name for name, one in found.items() if one.process), next(iter(found), None))
        return {self.which: gr.update(choices=list(found), value=first)}

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        self.control(self.which)
        shown = [self.last_look, self.which, self.state, self.log, self.report, self.take, self.take_best]
        download(self.take_best, self.copy_of_best, self.which, "download_best")
        self.which.change(self.look, self.which, shown, **QUIET)
        self.timer.tick(self.look, [self.which, self.last_look], shown, queue=False, **QUIET)
        page.frames[self].select(lambda: gr.Timer(active=True), None, self.timer, **QUIET)

    def look(self, name: str, seen: tuple | None = None):
        """Return the values that have changed since the last poll: state and log, and the report if it has changed.

        `seen`: the state at the last poll."""
        known = self.library.experiments()
        if name not in known:
            # The user may be typing a name; without a selection, or if it was removed, select the newest.
            gone = not name or (seen is not None and name == seen[0])
            if known and gone:
                return {self.which: gr.update(choices=list(known), value=next(iter(known)))}
            nothing = {self.state: views.notice(experiments.NONE), self.report: ""}
            return nothing if not known and seen is None else gr.skip()
        found = known[name]
        status = self.jobs.status(found)
        now = (name, tuple(known), found.fingerprint(), status, found.activity, found.log_tail())
        if now == seen:
            return gr.skip()
        updates = {
            self.last_look: now,
            self.state: experiments.summary(found, status, self.jobs.last_line(found)),
            self.log: views.log(self.jobs.log(found), status),
        }
        if seen is None or now[:3] != seen[:3]:
            updates[self.which] = gr.update(choices=list(known))
            updates[self.report] = experiments.report(found)
            updates[self.take] = gr.update(value=self.copy_of_report(found), interactive=bool(found.report()))
            updates[self.take_best] = gr.update(interactive=found.lora() is not None)
        return updates

    def copy_of_report(self, experiment: Experiment) -> str | None:
        """Return the path of a copy of the report to download, or None if no report exists yet."""
        content = experiment.report()
        if not content:
            return None
        path = new_file(f"{launcher.safe_name(experiment.name)}-report.html")
        path.write_text(content, encoding="utf-8")
        return str(path)

    def copy_of_best(self, name: str) -> str:
        """Return the path of a copy of the best run's LoRA file to download. Raises `RunError` if none exists."""
        found = self.library.find(name, Experiment)
        path = found.lora()
        if path is None:
            raise RunError(
                "There is no LoRA file: it is written when the runs are compared, unless the best method is OFT."
            )
        return str(packed(found, Download("best", path, (path,), "", "")))
