"""Chains and merge: who is linked to whom, what the merge did, and merging a checkpoint by another method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from .. import views
from ..handlers import NO_PROGRESS, readable_errors
from ..runs import Run
from ..studio import MERGE_CHOICES
from ..verdict import merge_warning
from .base import Parts, Tab
from .generate import GenerateTab

if TYPE_CHECKING:
    from ..page import Page


class ChainsTab(Tab):
    title, id = "Chains and merge", "chains"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row():
            with gr.Column(scale=5, min_width=360):
                gr.Markdown("### Who is linked to whom")
                self.plan = gr.HTML(elem_id="plan")
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("### Merge a checkpoint by another method")
                self.checkpoint = gr.Dropdown(label="Checkpoint", allow_custom_value=True, interactive=True)
                self.merge_method = gr.Dropdown(MERGE_CHOICES, value=MERGE_CHOICES[0], label="Merge method")
                self.merge = gr.Button("Merge and export", variant="primary", elem_id="merge")
                self.merged = gr.Markdown(
                    "`lstsq` fits what the neighbours add, from samples the run has kept; `input` and `weights` are "
                    "the paper's; `none` drops the shortcuts. The result appears under **Generate**."
                )
        gr.Markdown("### What the merge did")
        self.report = gr.HTML(elem_id="report")
        gr.Markdown("### ResLoRA's weights beside LoRA's")
        self.norms = gr.HTML(elem_id="norms")
        self.done = gr.State(None)
        self.watched = [self.checkpoint]
        self.of_run = [self.plan, self.report, self.norms]
        self.chosen = self.checkpoint

    def events(self, page: Page) -> None:
        asked, shown = [page.run, self.checkpoint, self.merge_method], [self.report, page.tab(GenerateTab).weights]
        gr.on([], readable_errors(self.do_merge), asked, [self.merged, *shown], api_name="merge", preprocess=False)
        quiet = {"api_visibility": "private", "preprocess": False}
        # In two steps: another run may have been chosen meanwhile, and the second reads which it is by then.
        self.merge.click(readable_errors(self.keep_merge), asked, [self.merged, self.done], **quiet).success(
            readable_errors(self.show_merge), [page.run, self.done], shown, **NO_PROGRESS, **quiet
        )

    def seen(self, run: Run) -> tuple:
        """The files that the tab shows."""
        return run.results()

    def choice(self, run: Run, chosen: str | None, seen: tuple | None) -> str | None:
        """The newest checkpoint, unless another one is chosen that is still there."""
        labels = self.list_checkpoints(run)
        return chosen if chosen in labels else next(iter(labels), None)

    def list_checkpoints(self, run: Run) -> list[str]:
        """What can be merged, the newest first."""
        return [weights.label for weights in run.checkpoints("reslora")]

    def shown(self, run: Run, label: str | None) -> dict:
        """Values of all that is watched."""
        labels = self.list_checkpoints(run)
        title = "Checkpoint" if labels else "Checkpoint (this run keeps none; a run of your own does)"
        return {self.checkpoint: gr.update(choices=labels, value=label, label=title)}

    def is_outdated(self, run: Run, seen: tuple | None) -> bool:
        """Once chains, merges or exports are others."""
        return seen != run.results()

    def filled_in(self, run: Run) -> dict:
        """Plan, merge report, and norms beside LoRA's."""
        plan, report = run.read_json("reslora", "chains.json"), run.read_json("reslora", "merge.json")
        merge = merge_warning(report) + views.merge_report(report)
        values = [views.chain_plan(plan), merge, views.norm_difference(run)]
        return dict(zip(self.of_run, values, strict=True))

    def do_merge(self, name: str, label: str, method: str) -> tuple:
        """Merges a checkpoint; says so, with the report, and offers the result under Generate."""
        run = self.library.find(name)
        checkpoint = run.find_weights(label)
        report = self.studio.merge(run, checkpoint, method)
        labels = [weights.label for weights in run.weights()]
        made = f"reslora: step {checkpoint.step} merged by {method}"
        shown = merge_warning(report) + views.merge_report(report)
        said = f"Done: **{made}** is under Generate, with the run `{run.name}`."
        return said, shown, gr.update(choices=labels, value=made)

    def keep_merge(self, name: str, label: str, method: str) -> tuple:
        """The same for the page: says so, and keeps the rest with the run's name."""
        said, *shown = self.do_merge(name, label, method)
        return said, (name, *shown)

    def show_merge(self, name: str, done: tuple) -> tuple:
        """Report and weights of the run that was merged, if that is still the one that is looked at."""
        merged, *shown = done
        return tuple(shown) if merged == name else (gr.skip(), gr.skip())
