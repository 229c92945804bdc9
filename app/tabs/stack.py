"""Part of Generate: stack several LoRAs, each with a strength, and write the selected weights as a complete model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import gradio as gr

from .. import stacks, views, whole_models
from ..generation_request import Request
from ..handlers import NO_PROGRESS, QUIET
from ..sessions import TURNS, hears
from ..studio import Cancelled
from .base import TabHost, answer_line, open_choice

if TYPE_CHECKING:
    from .generate import GenerateTab


class StackPart:
    """The stack of LoRAs, in a collapsed section below the form for single images."""

    def __init__(self, tab: GenerateTab) -> None:
        self.tab, self.library, self.studio = tab, tab.library, tab.studio
        with gr.Accordion("Several LoRAs at once, or a full model", open=False, elem_id="stack") as self.frame:
            self.loras = open_choice(
                "LoRAs from runs of this model, used instead of the weights above", multiselect=True,
                elem_id="loras",
            )  # fmt: skip
            self.strengths = gr.Textbox(
                "",
                label="Strength of each LoRA, in the order above",
                placeholder="1 for all",
                max_lines=1,
                elem_id="strengths",
            )
            self.name = gr.Textbox(
                "full-model", label="Name of the new model folder", max_lines=1, elem_id="model-name"
            )
            with gr.Row():
                self.write = gr.Button("Merge into a full model folder", elem_id="write-model", scale=3)
                self.stop = gr.Button("Stop", elem_id="stop-model", scale=1, min_width=80)
            self.status = answer_line(
                views.notice("Writes the base model with the selected weights merged into it, as one folder."),
                elem_id="model-status",
            )
            common = {"interactive": False, "buttons": ["copy"], "elem_classes": "code"}
            with gr.Column(visible=False) as self.found:
                self.place = gr.Textbox(label="Path", max_lines=1, elem_id="model-place", **common)
                self.use = gr.Textbox(label="Load it with", lines=3, elem_id="model-use", **common)
        self.inputs = [self.loras, self.strengths]

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        tab = self.tab
        self.frame.expand(self.offer, page.run, self.loras, preprocess=False, **QUIET)
        self.write.click(
            self.write_whole,
            [page.run, tab.weights, tab.adapter, tab.strength, self.name, tab.adapter_config, *self.inputs],
            [self.status, self.place, self.use, self.found],
            api_name="full_model", preprocess=False, **NO_PROGRESS, **TURNS,
        ).failure(lambda: "", None, self.status, api_visibility="private")  # fmt: skip
        self.stop.click(tab.stopper("model"), None, self.status, queue=False, **QUIET)
        gr.api(self.list_loras, api_name="loras")

    def list_loras(self, run: str) -> list[str]:
        """Return the names of the LoRAs of all runs with the same base model as this run."""
        return list(stacks.loras(self.library, self.library.find(run)))

    def offer(self, name: str) -> dict:
        """Return the update of the choices of LoRAs for the run with this name; without a name, change nothing."""
        return gr.update(choices=self.list_loras(name)) if name else gr.skip()

    def write_whole(
        self, name, label, adapter, strength, model, adapter_config=None, loras=None, strengths="",
        asked: gr.Request = None,
    ) -> Iterator[tuple]:  # fmt: skip
        """Write the run's complete model with the selected weights; yield progress, path, and how to load the model."""
        Request(strength=strength).check()
        run, target = self.library.find(name), whole_models.place_for(self.library, model)
        weights = self.tab.chosen_weights(run, label, adapter, adapter_config, loras, strengths)
        weights, session = stacks.to_write(weights, float(strength)), asked.session_hash
        nothing = "", "", gr.update(visible=False)
        try:
            for event in self.studio.write_whole(run, weights, target, session or "", lambda: hears(asked)):
                yield views.progress(event.text, 0.5), *nothing
        except Cancelled:
            yield views.notice("Cancelled; nothing was written."), *nothing
            return
        place = target.as_posix()
        said = views.notice(f"{place} is written: {weights.label}.")
        yield said, place, whole_models.lines_for(place), gr.update(visible=True)
