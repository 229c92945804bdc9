"""Part of Generate: a grid of images for pairs of values of two settings."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import gradio as gr

from reslora.formatting import pluralize

from .. import grids, views
from ..downloads import new_file
from ..generation_request import Request
from ..handlers import NO_PROGRESS, QUIET, path_of
from ..launcher import safe_name
from ..runs import RunError
from ..studio import Cancelled
from .base import TabHost, answer_line

if TYPE_CHECKING:
    from .generate import GenerateTab


class GridPart:
    """The X/Y grid, in a collapsed section below the form for single images."""

    def __init__(self, tab: GenerateTab) -> None:
        self.tab = tab
        with gr.Accordion("X/Y grid: images over two settings", open=False, elem_id="xy-grid"):
            self.axes = [
                self.axis_row("x", grids.AXES, "strength"),
                self.axis_row("y", (grids.NONE, *grids.AXES), "seed"),
            ]
            with gr.Row():
                self.go = gr.Button("Generate grid", elem_id="draw-grid", min_width=100)
                self.stop = gr.Button("Stop", elem_id="stop-grid", min_width=80)
                self.sheet = gr.DownloadButton(
                    "Download picture", elem_id="grid-sheet", min_width=120, interactive=False
                )
            self.status = answer_line(
                views.notice("All other settings are those above; Generate with a cell's settings makes its image."),
                elem_id="xy-status",
            )
            self.now = gr.HTML(elem_id="xy-now")
            self.table = gr.HTML(elem_id="xy")
            self.cells = gr.File(file_count="multiple", visible=False)

    def axis_row(self, which: str, names: tuple[str, ...], first: str) -> tuple:
        """Make the components of an axis: a dropdown of settings, and a text box for the values.

        `which`: `x` or `y`. `names`: settings to choose from. `first`: the setting selected at first."""
        with gr.Row():
            # Not preprocessed: an API client's invalid name gets a message that explains it.
            name = gr.Dropdown(
                list(names), value=first, label=which.upper(), elem_id=f"axis-{which}", min_width=190, scale=1
            )
            values = gr.Textbox(
                grids.SUGGESTED[first], label=f"Values of {which.upper()}", max_lines=6, min_width=150,
                placeholder="spaces between them; commas between methods; a line for each prompt",
                elem_id=f"values-{which}", scale=3,
            )  # fmt: skip
        return name, values

    def events(self, page: TabHost) -> gr.events.Dependency:
        """Connect the components, and return the event that generates the images."""
        tab = self.tab
        numbers = [tab.seed, tab.steps, tab.guidance, tab.width, tab.height, tab.strength]
        drawing = self.go.click(
            self.draw_grid,
            [
                page.run, tab.weights, tab.adapter, tab.prompt, tab.negative, *numbers,
                *(part for axis in self.axes for part in axis), tab.reference,
            ],
            [self.table, self.status, self.sheet, self.cells],
            api_name="grid", preprocess=False, concurrency_id="device", **NO_PROGRESS,
        )  # fmt: skip
        drawing.success(lambda: gr.update(interactive=True), None, self.sheet, api_visibility="private")
        self.stop.click(tab.stop, None, self.status, queue=False, **QUIET)
        for name, values in self.axes:
            # Not `input` or `select`: as under Train, they would overwrite typed values, and `select` would answer a
            # second time.
            name.change(self.suggest, [page.run, name], values, preprocess=False, **QUIET)
        return drawing

    def suggest(self, name: str, axis: str) -> str:
        """Return suggested values of the setting `axis`, as text for the form, also if no run is selected."""
        return grids.suggestion(self.tab.library.runs().get(str(name)), axis)

    def draw_grid(
        self, name, label, adapter, prompt, negative, seed, steps, guidance, width, height, strength, x, x_values, y,
        y_values, reference=None,
    ) -> Iterator[tuple | dict]:  # fmt: skip
        """Yield the grid and the progress as images are generated.

        At the end, or if the grid is stopped, also yield the grid as one image file, and the files of the cells."""
        run = self.tab.library.find(name) if name else None
        weights = self.tab.chosen_weights(run, label, adapter)
        request = Request(prompt, negative, seed, steps, guidance, width, height, 1, strength).checked()
        axes = grids.axis("X", x, x_values), grids.axis("Y", y, y_values)
        grid = grids.grid(run, weights, request, *axes)
        drawn, files, shown, total = {}, {}, {}, pluralize(len(grid.cells), "cell")
        yield grids.table(grid, shown), "", None, None
        given = path_of(reference)
        cells, pictures = iter(grid.cells), [replace(one, reference=given) for one in grid.cells.values()]
        try:
            for event in self.tab.studio.draw(run, pictures):
                place, path = next(cells), self.tab.save(event)
                drawn[place], files[place] = event, path
                shown[place] = f"gradio_api/file={urllib.parse.quote(path)}"
                yield {self.table: grids.table(grid, shown)}
            said = views.notice(f"{len(drawn)} of {total} done")
        except Cancelled:
            said = views.notice(f"Stopped after {len(drawn)} of {total}.")
        except RunError as error:
            if not drawn:
                raise
            said = views.notice(f"{error} The grid ended after {len(drawn)} of {total}.")
        sheet = None
        if drawn:
            sheet = str(grids.save_sheet(grid, drawn, new_file(f"{safe_name(name or 'base')}-grid.png")))
        # Yield all values again instead of `skip`: an API client gets the last ones.
        yield grids.table(grid, shown), said, sheet, [files[place] for place in sorted(files)]
