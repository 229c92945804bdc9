"""Part of Compare: the chain plan, the merge report, and merging a checkpoint by another merge method."""

import gradio as gr

from .. import views
from ..handlers import NO_PROGRESS
from ..runs import Run
from ..studio import MERGE_CHOICES
from ..verdict import merge_warning
from .base import Parts, Tab, TabHost, open_choice
from .generate import GenerateTab


class ChainsTab(Tab):
    """The part that shows the linked layers and the merge report, and merges a checkpoint by another merge method."""

    fold = "Linked layers and merge"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row():
            with gr.Column(scale=5, min_width=360):
                gr.Markdown("### Linked layers")
                self.plan = gr.HTML(elem_id="plan")
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("### Merge a checkpoint by another method")
                self.checkpoint = open_choice("Checkpoint")
                self.merge_method = gr.Dropdown(MERGE_CHOICES, value=MERGE_CHOICES[0], label="Merge method")
                self.merge = gr.Button("Merge and export", elem_id="merge")
                self.merged = gr.HTML(
                    "<code>lstsq</code> fits the shortcut terms by least squares, on samples stored with the run; "
                    "<code>input</code> and <code>weights</code> are the paper's merges; <code>none</code> drops the "
                    "shortcuts. The result appears under <b>Generate</b>."
                )
        gr.Markdown("### Merge report")
        self.report = gr.HTML(elem_id="report")
        gr.Markdown("### Norms of ResLoRA's and LoRA's updates")
        self.norms = gr.HTML(elem_id="norms")
        self.done = gr.State(None)
        self.watched = [self.checkpoint]
        self.of_run = [self.plan, self.report, self.norms]
        self.chosen = self.checkpoint

    def events(self, page: TabHost) -> None:
        """Connect the merge button and its endpoint."""
        asked, shown = [page.run, self.checkpoint, self.merge_method], [self.report, page.tab(GenerateTab).weights]
        gr.on([], self.do_merge, asked, [self.merged, *shown], api_name="merge", preprocess=False)
        quiet = {"api_visibility": "private", "preprocess": False}
        # In two steps: another run may be selected during the merge, and the second step reads the current one.
        self.merge.click(self.keep_merge, asked, [self.merged, self.done], **quiet).success(
            self.show_merge, [page.run, self.done], shown, **NO_PROGRESS, **quiet
        )

    def seen(self, run: Run) -> tuple:
        """Return a value that changes if a file that the tab shows has changed."""
        return run.results()

    def choice(self, run: Run, chosen: str | None, seen: tuple | None) -> str | None:
        """Return the selected checkpoint if it still exists, else the newest one."""
        labels = self.list_checkpoints(run)
        return chosen if chosen in labels else next(iter(labels), None)

    def list_checkpoints(self, run: Run) -> list[str]:
        """Return the labels of the checkpoints that can be merged, newest first."""
        return [weights.label for weights in run.checkpoints("reslora")]

    def shown(self, run: Run, label: str | None) -> dict:
        """Return the new values of the components in `watched`, by component; `label`: the selected checkpoint."""
        labels = self.list_checkpoints(run)
        title = "Checkpoint" if labels else "Checkpoint (this run has none)"
        return {self.checkpoint: gr.update(choices=labels, value=label, label=title)}

    def is_outdated(self, run: Run, seen: tuple | None) -> bool:
        """Return whether the chain plan, the merge report or an export has changed."""
        return seen != run.results()

    def filled_in(self, run: Run) -> dict:
        """Return the chain plan, the merge report, and the comparison of norms with LoRA, by component."""
        plan, report = run.read_json("reslora", "chains.json"), run.read_json("reslora", "merge.json")
        merge = merge_warning(report) + views.merge_report(report)
        return {self.plan: views.chain_plan(plan), self.report: merge, self.norms: views.norm_difference(run)}

    def do_merge(self, name: str, label: str, method: str) -> tuple:
        """Merge a checkpoint; return a sentence that reports it, the merge report, and an update of Generate's weights.

        `name`: the run. `label`: the checkpoint. `method`: the merge method."""
        run = self.library.find(name)
        checkpoint = run.find_weights(label)
        report = self.studio.merge(run, checkpoint, method)
        labels = [weights.label for weights in run.weights()]
        made = f"reslora: step {checkpoint.step} merged by {method}"
        shown = merge_warning(report) + views.merge_report(report)
        said = f"Done: <b>{made}</b> is under Generate, with the run <code>{views.escape(run.name)}</code>."
        return said, shown, gr.update(choices=labels, value=made)

    def keep_merge(self, name: str, label: str, method: str) -> tuple:
        """Return the first result of `do_merge`, and a tuple of the run's name and its other results."""
        said, *shown = self.do_merge(name, label, method)
        return said, (name, *shown)

    def show_merge(self, name: str, done: tuple) -> tuple:
        """Return the merge report and the update of Generate's weights, if the merged run is still selected.

        `done`: the second result of `keep_merge`."""
        merged, *shown = done
        return tuple(shown) if merged == name else (gr.skip(), gr.skip())
