"""Generate: generate images with a run's weights or an uploaded LoRA file, and compare them with the base model."""

import contextlib
import secrets
from collections.abc import Iterator

import gradio as gr

from reslora.formatting import pluralize

from .. import generation_request, views, weight_files
from ..downloads import new_file
from ..generation_request import Drawn, Request
from ..handlers import NO_PROGRESS, QUIET, path_of
from ..runs import BASE, Run, RunError, Weights
from ..studio import Cancelled
from ..verdict import warning_for
from .base import Parts, Tab, TabHost, answer_line, open_choice
from .grid import GridPart

EVERY = 0.5
"""Seconds between two polls of the progress."""


class GenerateTab(Tab):
    """The tab that generates images."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        with gr.Row(elem_id="generating"):
            with gr.Column(scale=2):
                self.settings_column()
            with gr.Column(scale=3, min_width=360):
                self.prompt = gr.Textbox(label="Prompt", elem_id="prompt")
                with gr.Row(elem_classes="actions"):
                    self.go = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.cancel = gr.Button("Cancel", elem_id="cancel")
                self.status = answer_line(views.notice("The first image also loads the model."), elem_id="status")
                self.now = gr.HTML(elem_id="now")
                self.gallery = gr.Gallery(
                    label="Images", height="auto", format="png", elem_id="gallery", interactive=False, columns=2,
                    object_fit="contain", buttons=["download", "fullscreen"],
                )  # fmt: skip
        self.grid = GridPart(self)
        self.timer = gr.Timer(EVERY, active=False)
        self.samples = [self.prompt, self.steps, self.guidance, self.width, self.height]
        """The settings with which a run generates samples."""
        self.polled = [self.weights, self.warning, *self.samples]
        self.chosen = self.weights

    def settings_column(self) -> None:
        """Make the components that select the weights and the settings of images."""
        self.weights = open_choice("Weights", elem_id="weights")
        self.warning = gr.HTML(elem_id="merge-warning", visible=False)
        self.negative = gr.Textbox(label="Negative prompt")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=100, elem_id="seed")
            self.random = gr.Checkbox(label="Random seed", min_width=100)
            self.images = gr.Slider(1, 8, 1, step=1, label="Images", min_width=100, elem_id="images")
        with gr.Row():
            self.steps = gr.Slider(1, 150, 20, step=1, label="Denoising steps", min_width=140, elem_id="denoising")
            self.guidance = gr.Slider(0, 30, 4, step=0.5, label="Guidance", min_width=140)
        with gr.Row():
            self.width = gr.Slider(32, 1024, 64, step=8, label="Width", min_width=140)
            self.height = gr.Slider(32, 1024, 64, step=8, label="Height", min_width=140)
        self.strength = gr.Slider(0, 2, 1, step=0.05, label="LoRA strength")
        self.beside = gr.Checkbox(True, label="Also generate with the base model")
        with gr.Accordion("Reference image, for edit models", open=False):
            self.reference = gr.File(
                label="Image that the prompt changes: Flux.1 Kontext, Qwen-Image-Edit", file_types=["image"], height=140
            )
        with gr.Accordion("LoRA file", open=False):
            self.adapter = gr.File(
                label="LoRA (.safetensors), used instead of the run's weights",
                file_types=[".safetensors"],
                height=140,
            )

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        numbers = [self.seed, self.steps, self.guidance, self.width, self.height, self.images, self.strength]
        settings = [self.prompt, self.negative, *numbers]
        # First, because Gradio's page handles the events of a component in order.
        gr.on(
            [self.go.click, self.prompt.submit, self.grid.go.click], lambda: gr.Timer(active=True), None, self.timer,
            queue=False, **QUIET,
        )  # fmt: skip
        drawing = gr.on(
            [self.go.click, self.prompt.submit], self.draw,
            [
                page.run, self.weights, self.adapter, self.beside, self.random, *settings, self.reference,
            ],
            [self.gallery, self.status, self.seed],
            api_name="generate", preprocess=False, concurrency_id="device", concurrency_limit=1, **NO_PROGRESS,
        )  # fmt: skip
        unqueued = {"queue": False, **NO_PROGRESS}
        self.cancel.click(self.stop, None, self.status, api_name="cancel", **unqueued)
        warned = [page.run, self.weights]
        self.weights.change(self.warn, warned, self.warning, preprocess=False, **QUIET)
        gr.api(self.list_weights, api_name="weights")
        shown = [self.now, self.grid.now, self.timer]
        self.timer.tick(self.progress, None, shown[:2], queue=False, **QUIET)
        for event in (drawing, self.grid.events(page)):
            for outcome in (event.success, event.failure):
                outcome(lambda: ("", "", gr.Timer(active=False)), None, shown, queue=False, **QUIET)

    # -- selected weights ----------------------------------------------------------------------------------------------

    def list_weights(self, run: str) -> list[str]:
        """Return the labels of a run's weights."""
        return [weights.label for weights in self.library.find(run).weights()]

    def seen(self, run: Run) -> tuple:
        """Return whether the run's settings exist, and the label of its default weights (see `Run.best_weights`)."""
        return bool(run.config), run.best_weights()

    def choice(self, run: Run, chosen: str | None, seen: tuple | None) -> str:
        """Return the label of the weights to select: the selected weights, or the run's default weights.

        The default weights are selected if they were selected at the last poll, or if `chosen` no longer exists.
        """
        best = chosen if seen is None else seen[1]
        return chosen if chosen != best and chosen in self.list_weights(run.name) else run.best_weights()

    def shown(self, run: Run, label: str) -> dict:
        """Return the choices of weights, of which `label` is selected, and the warning, by component.

        The warning is also updated, because the same label means other weights in another run.
        """
        weights = gr.update(choices=self.list_weights(run.name), value=label)
        return {self.weights: weights, self.warning: self.warn(run.name, label)}

    def is_outdated(self, run: Run, seen: tuple | None) -> bool:
        """Return whether the run's settings have been written since the last poll."""
        return seen is not None and not seen[0] and bool(run.config)

    def filled_in(self, run: Run) -> dict:
        """Return the settings with which the run generates samples, by component."""
        asked = generation_request.of_samples(run)
        values = [asked.prompt, asked.steps, asked.guidance, asked.width, asked.height]
        return dict(zip(self.samples, values, strict=True))

    def warn(self, name: str, label: str) -> dict:
        """Return the update of the warning about a run's weights; it is hidden if there is no warning."""
        text = ""
        with contextlib.suppress(RunError):  # the run or the weights do not exist any more
            run = self.library.find(name)
            text = warning_for(run, run.find_weights(label))
        return gr.update(value=text, visible=bool(text))

    def chosen_weights(self, run: Run | None, label: str, adapter) -> Weights:
        """Return the weights to use: an uploaded LoRA file, else the run's weights."""
        if path := path_of(adapter):
            return weight_files.uploaded(path)
        return run.find_weights(label) if run else BASE

    # -- generation ----------------------------------------------------------------------------------------------------

    def draw(
        self, name, label, adapter, beside, random, prompt, negative, seed, steps, guidance, width, height, images,
        strength, reference=None,
    ) -> Iterator[tuple | dict]:  # fmt: skip
        """Yield updates as images are generated: all images so far, progress and seed.

        `beside`: also generate each image with the base model. `random`: use a random seed."""
        run = self.library.find(name) if name else None
        weights = self.chosen_weights(run, label, adapter)
        choices = [BASE, weights] if beside and weights.kind != "base" else [weights]
        seed = secrets.randbelow(generation_request.SEEDS) if random else seed
        request = Request(prompt, negative, seed, steps, guidance, width, height, images, strength).checked()
        done, files, wanted = [], [], request.images * len(choices)
        yield [], "", request.seed
        try:
            for drawn in self.studio.generate(run, choices, request, path_of(reference)):
                done.append(drawn)
                files.append((self.save(drawn), f"{drawn.weights} · seed {drawn.request.seed}"))
                yield {self.gallery: list(files)}
        except Cancelled:
            yield {self.status: views.notice(f"Cancelled after {len(done)} of {pluralize(wanted, 'image')}.")}
            return
        # Yield all values again instead of `skip`: an API client gets the last ones.
        said = views.notice(f"{len(done)} of {pluralize(wanted, 'image')} done")
        yield files, said, request.seed

    def save(self, drawn: Drawn) -> str:
        """Save a generated image, with its settings, as a PNG file; return the path of Gradio's copy."""
        path = generation_request.save_image(drawn, new_file(f"seed-{drawn.request.seed}.png"))
        return self.gallery.move_resource_to_block_cache(path)

    def progress(self) -> tuple[str, str]:
        """Return the progress of the current request as text, twice: for the images and for the grid."""
        shown = views.progress(*self.studio.now) if self.studio.now else ""
        return shown, shown

    def stop(self):
        """Stop the current request, which then reports it itself; return a notice if there is none."""
        return gr.skip() if self.studio.cancel() else views.notice("Nothing is being generated.")
