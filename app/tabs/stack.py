"""Part of Generate: stack several LoRAs, each with a strength."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

from .. import stacks
from ..handlers import QUIET
from .base import TabHost, open_choice

if TYPE_CHECKING:
    from .generate import GenerateTab


class StackPart:
    """The stack of LoRAs, in a collapsed section below the form for single images."""

    def __init__(self, tab: GenerateTab) -> None:
        self.tab, self.library, self.studio = tab, tab.library, tab.studio
        with gr.Accordion("Several LoRAs at once", open=False, elem_id="stack") as self.frame:
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
        self.inputs = [self.loras, self.strengths]

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        self.frame.expand(self.offer, page.run, self.loras, preprocess=False, **QUIET)
        gr.api(self.list_loras, api_name="loras")

    def list_loras(self, run: str) -> list[str]:
        """Return the names of the LoRAs of all runs with the same base model as this run."""
        return list(stacks.loras(self.library, self.library.find(run)))

    def offer(self, name: str) -> dict:
        """Return the update of the choices of LoRAs for the run with this name; without a name, change nothing."""
        return gr.update(choices=self.list_loras(name)) if name else gr.skip()
