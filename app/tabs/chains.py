"""Chains and merge: who is linked to whom, what the merge did, and merging a checkpoint by another method."""

from __future__ import annotations

import gradio as gr

from .. import views
from ..polite import polite
from ..runs import Library, Run
from ..studio import MERGE_CHOICES, Studio


class ChainsTab:
    def __init__(self, library: Library, studio: Studio) -> None:
        self.library, self.studio = library, studio
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
        self.watched = [self.checkpoint]
        self.of_run = [self.plan, self.report, self.norms]

    def events(self, run: gr.Dropdown, weights: gr.Dropdown) -> None:
        self.merge.click(
            polite(self.do_merge), [run, self.checkpoint, self.merge_method],
            [self.merged, self.report, weights], api_name="merge", preprocess=False,
        )  # fmt: skip

    def shown(self, run: Run) -> dict:
        """Values of all that is watched."""
        labels = [weights.label for weights in run.checkpoints("reslora")]
        label = "Checkpoint" if labels else "Checkpoint (this run keeps none; a run of your own does)"
        return {self.checkpoint: gr.update(choices=labels, value=next(iter(labels), None), label=label)}

    def results_of(self, run: Run) -> dict:
        """Plan, merge report, and norms beside LoRA's."""
        plan, report = run.read_json("reslora", "chains.json"), run.read_json("reslora", "merge.json")
        values = [views.chain_plan(plan), views.merge_report(report), views.norm_difference(run)]
        return dict(zip(self.of_run, values, strict=True))

    def do_merge(self, name: str, label: str, method: str) -> tuple:
        """Merges a checkpoint; says so, with the report, and offers the result under Generate."""
        run = self.library.find(name)
        checkpoint = run.find_weights(label)
        report = self.studio.merge(run, checkpoint, method)
        labels = [weights.label for weights in run.weights()]
        made = f"reslora: step {checkpoint.step} merged by {method}"
        return f"Done: **{made}** is under Generate.", views.merge_report(report), gr.update(choices=labels, value=made)
