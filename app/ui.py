"""The page: four tabs over the runs of a library. Layout and events; what they show comes from the other modules."""

from __future__ import annotations

import functools
import inspect
import math
import shutil
import sys
import tempfile
import traceback
import uuid
from pathlib import Path

import gradio as gr

from . import generate, training, views
from .generate import MERGES, Cancelled, Picture, Request, Status, Step, Studio
from .runs import BASE, Library, Run, RunError
from .training import Trainings

EVERY = 2.0
"""Seconds between two looks at the runs folder."""
STYLE = Path(__file__).with_name("style.css")
EXPLANATION = (
    "**ResLoRA** trains LoRA blocks with residual shortcuts between neighbouring layers, then merges them away; "
    "what is left is a plain LoRA. All pictures in a row have the same caption and seed: only the method differs."
)


def create_demo(library: Library, trainings: Trainings, studio: Studio | None = None) -> gr.Blocks:
    """The page as Gradio blocks; nothing is loaded or read before somebody looks at it."""
    with gr.Blocks(
        title="ResLoRA for Stable Diffusion", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as demo:
        Page(library, trainings, studio or Studio()).build(demo)
    demo.queue(max_size=32, default_concurrency_limit=4)
    return demo


def look() -> dict:
    """Theme and style, as `launch` takes them; system fonts only, so that the page works offline."""
    theme = gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {"theme": theme, "css_paths": [STYLE]}


def polite(handler):
    """Errors for people: one sentence, no path and no traceback; whatever is unexpected goes to the terminal."""

    def translated(error: Exception) -> gr.Error:
        if isinstance(error, RunError):
            return gr.Error(str(error), print_exception=False)
        traceback.print_exception(error, file=sys.stderr)
        return gr.Error("Something went wrong; the terminal says more.", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def wrapped(*args, **kwargs):
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise translated(error) from None
    else:

        @functools.wraps(handler)
        def wrapped(*args, **kwargs):
            try:
                return handler(*args, **kwargs)
            except Exception as error:
                raise translated(error) from None

    return wrapped


class Page:
    """Components and the functions behind them."""

    def __init__(self, library: Library, trainings: Trainings, studio: Studio) -> None:
        self.library, self.trainings, self.studio = library, trainings, studio
        self.files = Path(tempfile.mkdtemp(prefix="pictures-"))

    def build(self, demo: gr.Blocks) -> None:
        """All components, then all events: a tab may refer to another one's components."""
        with gr.Row(elem_id="top"):
            gr.Markdown(f"# ResLoRA for Stable Diffusion\n{EXPLANATION}", elem_id="title")
            # Any value may be sent, so that runs begun meanwhile can be; the library decides whether there is one.
            self.run = gr.Dropdown(label="Run", allow_custom_value=True, interactive=True, elem_id="run", min_width=240)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                self.compare_tab()
            with gr.Tab("Generate", id="generate"):
                self.generate_tab()
            with gr.Tab("Train", id="train"):
                self.train_tab()
            with gr.Tab("Chains and merge", id="chains"):
                self.chains_tab()
        self.seen = gr.State(None)
        self.timer = gr.Timer(EVERY)
        self.events(demo)

    # -- layout --------------------------------------------------------------------------------------------------------

    def compare_tab(self) -> None:
        self.summary = gr.HTML(elem_id="summary")
        with gr.Row(equal_height=True):
            self.step = gr.Slider(0, 1, value=0, step=1, label="Step", elem_id="step", scale=6)
            self.play = gr.Button("▶ Play", elem_id="play", scale=1, min_width=90)
            self.download = gr.Button("Download grid", elem_id="download", scale=1, min_width=120)
            self.grid_file = gr.DownloadButton("grid", visible="hidden", elem_id="grid-file")
        self.playing = gr.Timer(0.8, active=False)
        self.grid = gr.HTML(elem_id="grid")
        with gr.Row():
            plot = functools.partial(
                gr.LinePlot, x="step", y="loss", color="method", color_map=views.color_map(), height=260, min_width=320
            )
            self.train_curve = plot(title="Training loss (running mean)", elem_id="train-curve")
            self.validation_curve = plot(title="Loss on held-out pictures", elem_id="validation-curve")
        self.numbers = gr.HTML(elem_id="numbers")

    def generate_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self.weights = gr.Dropdown(
                    label="Weights", allow_custom_value=True, interactive=True, elem_id="weights"
                )
                self.prompt = gr.Textbox(label="Prompt", elem_id="prompt")
                self.negative = gr.Textbox(label="Negative prompt")
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, min_width=100)
                    self.random = gr.Checkbox(False, label="Random seed", min_width=100)
                    self.images = gr.Slider(1, 8, 1, step=1, label="Images", min_width=100, elem_id="images")
                with gr.Row():
                    self.steps = gr.Slider(
                        1, 150, 20, step=1, label="Denoising steps", min_width=140, elem_id="denoising"
                    )
                    self.guidance = gr.Slider(0, 30, 4, step=0.5, label="Guidance", min_width=140)
                with gr.Row():
                    self.width = gr.Slider(32, 1024, 64, step=8, label="Width", min_width=140)
                    self.height = gr.Slider(32, 1024, 64, step=8, label="Height", min_width=140)
                self.strength = gr.Slider(0, 2, 1, step=0.05, label="Adapter strength")
                self.beside = gr.Checkbox(True, label="Same seed with the base model beside it")
                with gr.Accordion("A LoRA file of your own, or settings from a picture", open=False):
                    self.adapter = gr.File(
                        label="LoRA (.safetensors), used instead of the run's weights",
                        file_types=[".safetensors"],
                        height=140,
                    )
                    self.recipe = gr.File(
                        label="PNG made here: takes over its settings", file_types=[".png"], height=140
                    )
            with gr.Column(scale=3, min_width=360):
                with gr.Row():
                    self.go = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.cancel = gr.Button("Cancel", elem_id="cancel")
                self.status = gr.HTML(views.notice("The model is loaded with the first picture."), elem_id="status")
                self.gallery = gr.Gallery(
                    label="Pictures", columns=2, height="auto", format="png", elem_id="gallery", interactive=False,
                    object_fit="contain", buttons=["download", "fullscreen"],
                )  # fmt: skip
                self.made = gr.HTML(elem_id="made")

    def train_tab(self) -> None:
        self.flags = {}
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                self.name = gr.Textbox("my-style", label="Name of the new run", max_lines=1, elem_id="name")
                self.pictures = gr.File(
                    label="Your pictures, with .txt captions if you like (none: the bundled ones)",
                    file_count="multiple", file_types=["image", ".txt"], height=150, elem_id="pictures",
                )  # fmt: skip
                self.caption = gr.Textbox(label="Caption of pictures without a .txt (empty: words of the file name)")
                self.folder = gr.Dropdown(
                    label="Or a folder of pictures on the server", choices=[], allow_custom_value=True,
                    visible=self.trainings.data is not None,
                )  # fmt: skip
                self.model = gr.Textbox(
                    label="Model", placeholder="bundled; or a name on the hub: owner/model", max_lines=1
                )
                with gr.Row():
                    for name, action in training.flags().items():
                        self.flags[name] = flag_widget(name, action)
            with gr.Column(scale=3, min_width=360):
                with gr.Row():
                    self.start = gr.Button("Start training", variant="primary", elem_id="start")
                    self.stop = gr.Button("Stop and save", elem_id="stop")
                    self.resume = gr.Button("Resume", elem_id="resume")
                    self.show = gr.Button("Show command", elem_id="show")
                self.command = gr.Textbox(
                    label="Command", lines=2, max_lines=8, buttons=["copy"], interactive=False, elem_id="command"
                )
                self.answer = gr.HTML(elem_id="answer")
                self.progress = gr.HTML(elem_id="progress")
                self.log = gr.HTML(elem_id="log")
                gr.Markdown(
                    "Training is a process of its own: closing this page does not stop it, and reopening finds it "
                    "again. *Stop* lets it save, *Resume* goes on from there. Its pictures arrive under **Compare**."
                )

    def chains_tab(self) -> None:
        with gr.Row():
            with gr.Column(scale=5, min_width=360):
                gr.Markdown("### Who is linked to whom")
                self.plan = gr.HTML(elem_id="plan")
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("### Merge a checkpoint by another method")
                self.checkpoint = gr.Dropdown(label="Checkpoint", allow_custom_value=True, interactive=True)
                self.merge_method = gr.Dropdown(MERGES, value=MERGES[0], label="Merge method")
                self.merge = gr.Button("Merge and export", variant="primary", elem_id="merge")
                self.merged = gr.Markdown(
                    "`lstsq` fits what the neighbours add, from samples the run has kept; `input` and `weights` are "
                    "the paper's; `none` drops the shortcuts. The result appears under **Generate**."
                )
        gr.Markdown("### What the merge did")
        self.report = gr.HTML(elem_id="report")
        gr.Markdown("### ResLoRA's weights beside LoRA's")
        self.norms = gr.HTML(elem_id="norms")

    # -- events --------------------------------------------------------------------------------------------------------

    def events(self, demo: gr.Blocks) -> None:
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        at_step = [self.grid, self.train_curve, self.validation_curve, self.numbers]
        watched = [self.seen, self.run, self.summary, self.step, *at_step]
        watched += [self.weights, self.checkpoint, self.progress, self.log]
        of_run = [self.prompt, self.steps, self.guidance, self.width, self.height, self.plan, self.report, self.norms]
        demo.load(polite(self.arrive), None, [self.run, self.folder], **quiet)
        self.run.change(polite(self.choose), self.run, [*watched, *of_run], **quiet)
        context = [self.run, self.step, self.seen, self.weights, self.checkpoint]
        # Not queued: a look that is lost with its queue's stream would be waited for, and the page would stand still.
        self.timer.tick(polite(self.watch), context, [*watched, *of_run], queue=False, **quiet)
        # Not preprocessed: Gradio would refuse a program's step beyond what the slider had when the page was built.
        self.step.change(
            polite(self.at_step), [self.run, self.step], at_step, api_name="compare",
            show_progress="hidden", trigger_mode="always_last", preprocess=False,
        )  # fmt: skip
        self.play.click(polite(self.toggle), self.play, [self.play, self.playing], **quiet)
        self.playing.tick(polite(self.next_step), [self.run, self.step], self.step, **quiet)
        self.download.click(
            polite(self.save_grid), [self.run, self.step], self.grid_file, api_name="download_grid", preprocess=False
        ).success(None, js="() => document.querySelector('#grid-file').click()", api_visibility="private")
        self.generate_events()
        self.train_events()
        self.merge.click(
            polite(self.do_merge), [self.run, self.checkpoint, self.merge_method],
            [self.merged, self.report, self.weights], api_name="merge",
        )  # fmt: skip
        gr.api(polite(self.list_runs), api_name="runs")
        gr.api(polite(self.list_weights), api_name="weights")

    def generate_events(self) -> None:
        settings = [self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height]
        settings += [self.images, self.strength]
        inputs = [self.run, self.weights, self.adapter, self.beside, self.random, *settings]
        for slider in (self.steps, self.guidance, self.width, self.height, self.images, self.strength):
            # Gradio refuses what a program sends beyond a slider's ends; `Request.clamped` takes the nearest instead.
            slider.preprocess = lambda value: value
        gr.on(
            [self.go.click, self.prompt.submit], polite(self.draw), inputs,
            [self.gallery, self.status, self.seed, self.made],
            api_name="generate", show_progress="hidden", concurrency_limit=4,
        ).failure(lambda: views.notice("That did not work."), None, self.status, api_visibility="private")  # fmt: skip
        self.cancel.click(
            polite(self.do_cancel), None, self.status, api_name="cancel", show_progress="hidden", queue=False
        )
        self.recipe.upload(
            polite(self.read_recipe), self.recipe, [*settings[:-2], self.strength, self.random], api_name="settings_of"
        )
        self.recipe.upload(polite(self.origin), self.recipe, self.status, api_visibility="private")

    def train_events(self) -> None:
        inputs = [self.name, self.pictures, self.caption, self.folder, self.model, *self.flags.values()]
        self.show.click(polite(self.do_show), inputs, self.command, api_name="train_command")
        self.start.click(polite(self.do_start), inputs, [self.run, self.command], api_name="train_start")
        # Not queued: they must not wait for what they end.
        self.stop.click(polite(self.do_stop), self.run, self.answer, api_name="train_stop", queue=False)
        self.resume.click(polite(self.do_resume), self.run, self.answer, api_name="train_resume")

    # -- looking -------------------------------------------------------------------------------------------------------

    def list_runs(self) -> list[str]:
        """Names of the runs, the newest first."""
        return list(self.library.runs())

    def list_weights(self, run: str) -> list[str]:
        """What pictures can be generated with, of a run."""
        return [weights.label for weights in self.library.find(run).weights()]

    def arrive(self):
        """Somebody opens the page: the run that is training, else the newest."""
        runs = self.library.runs()
        first = next((name for name, run in runs.items() if run.process), next(iter(runs), None))
        return gr.update(choices=list(runs), value=first), gr.update(choices=self.trainings.folders())

    def choose(self, name: str):
        """Everything that is seen of a run, at its last step."""
        if not name:
            return [gr.skip()] * 20
        run = self.library.find(name)
        last = max(run.steps(), default=0)
        return [*self.seen_of(run, last, run.best_weights()), *self.settings_of(run), *views.chains_and_merge(run)]

    def settings_of(self, run: Run) -> list:
        """What the run drew its samples with, for Generate."""
        config = run.config
        asked = Request(
            prompt=next(iter(run.prompts), ""), steps=config.get("num_inference_steps"),
            guidance=config.get("guidance_scale"), width=config.get("resolution"), height=config.get("resolution"),
        ).clamped()  # fmt: skip
        return [asked.prompt, asked.steps, asked.guidance, asked.width, asked.height]

    def watch(self, name: str, step: float, seen, label: str, checkpoint: str | None):
        """What has changed since the last look; a slider at the end moves on with the run.

        What stays as chosen is not sent: somebody may have chosen anew since.
        """
        nothing = [gr.skip()] * 20
        runs = self.library.runs()
        if not name or name not in runs:
            return [gr.skip(), gr.update(choices=list(runs)), *nothing[2:]] if runs and seen is None else nothing
        run = runs[name]
        if self.state_of(run) == seen:
            return nothing
        steps = run.steps()
        before = max(seen[0], default=0) if seen else 0
        shown, chosen = step, label
        step = max(steps, default=0) if (step or 0) >= before else run.nearest(step)
        labels = [weights.label for weights in run.weights()]
        untouched = seen is None or label == seen[-1]
        label = run.best_weights() if untouched or label not in labels else label
        updates = self.seen_of(run, step, label)
        checkpoints = [weights.label for weights in run.checkpoints("reslora")]
        for update, stays in ((3, step == shown), (8, label == chosen), (9, checkpoint in checkpoints)):
            if stays:
                del updates[update]["value"]
        begun = seen is not None and not seen[1] and bool(run.config)
        settings = self.settings_of(run) if begun else nothing[:5]
        merges = views.chains_and_merge(run) if seen is None or seen[2] != run.results() else nothing[:3]
        return [*updates, *settings, *merges]

    def state_of(self, run: Run) -> tuple:
        """What `watch` compares: when it is the same, the page is up to date."""
        names = tuple(self.library.runs())
        state = run.fingerprint(), self.trainings.status(run), names, run.log_tail()
        return tuple(run.steps()), bool(run.config), run.results(), *state, run.best_weights()

    def seen_of(self, run: Run, step: int, label: str) -> list:
        """Values of the components that `watch` keeps up to date."""
        steps, status = run.steps(), self.trainings.status(run)
        slider = gr.update(
            minimum=0, maximum=max(steps, default=1) or 1, step=max(1, math.gcd(*steps)) if steps else 1, value=step
        )
        summary = views.summary(run, status)
        labels = [weights.label for weights in run.weights()]
        checkpoints = [weights.label for weights in run.checkpoints("reslora")]
        return [
            self.state_of(run),
            gr.update(choices=list(self.library.runs())),
            summary,
            slider,
            *self.at_step(run.name, step),
            gr.update(choices=labels, value=label),
            gr.update(choices=checkpoints, value=next(iter(checkpoints), None), label=label_of(checkpoints)),
            summary,
            views.log(self.trainings.log(run)),
        ]

    def at_step(self, name: str, step: float):
        """Pictures, curves and numbers at a step."""
        run = self.library.find(name)
        step = run.nearest(step)
        train, validation = (views.curves(run, split, step) for split in ("train", "validation"))
        return views.comparison(run, step), train, validation, views.numbers(run, step)

    def toggle(self, label: str):
        playing = "Pause" not in label
        return "❚❚ Pause" if playing else "▶ Play", gr.Timer(active=playing)

    def next_step(self, name: str, step: float):
        steps = self.library.find(name).steps()
        return next((s for s in steps if s > step), steps[0] if steps else 0)

    def save_grid(self, name: str, step: float) -> str:
        run = self.library.find(name)
        step = run.nearest(step)
        path = self.new_file(f"{training.safe_name(run.name)}-step-{step}.png")
        views.grid(run, step).save(path)
        return str(path)

    def new_file(self, name: str) -> Path:
        # Gradio has copied what it serves; a person doesn't look back further than this.
        for old in sorted(self.files.iterdir(), key=lambda path: path.stat().st_mtime)[:-200]:
            shutil.rmtree(old, ignore_errors=True)
        folder = self.files / uuid.uuid4().hex
        folder.mkdir()
        return folder / name

    # -- generating ----------------------------------------------------------------------------------------------------

    def draw(
        self, name, label, adapter, beside, random, prompt, negative, seed, steps, guidance, width, height, images,
        strength, asked: gr.Request,
    ):  # fmt: skip
        """Pictures one after the other, with the step of the current one; beside each, the base model's."""
        run = self.library.find(name) if name else None
        weights = generate.uploaded(adapter) if adapter else run.find_weights(label) if run else BASE
        choices = [BASE, weights] if beside and weights.kind != "base" else [weights]
        request = Request(prompt, negative, -1 if random else seed, steps, guidance, width, height, images, strength)
        request, files = request.clamped(), []
        done, wanted, text = [], request.images * len(choices), "Starting"
        yield [], views.progress(text, 0), request.seed, ""
        try:
            for event in self.studio.generate(run, choices, request, asked.session_hash or ""):
                if isinstance(event, Status):
                    text = event.text
                if isinstance(event, Picture):
                    done = [*done, event]
                share = event.done / event.total if isinstance(event, Step) else 0.0
                bar = views.progress(text, (len(done) + share) / wanted)
                if isinstance(event, Picture):
                    files.append((str(self.save(event)), views.caption(event)))
                    yield list(files), bar, gr.skip(), views.settings_table(done)
                else:
                    yield gr.skip(), bar, gr.skip(), gr.skip()
        except Cancelled:
            yield gr.skip(), views.notice(f"Cancelled after {len(done)} of {wanted} pictures."), gr.skip(), gr.skip()
            return
        # Everything once more, not `skip`: a program gets what comes last.
        bar = views.progress(f"{len(done)} of {wanted} pictures are done", 1)
        yield files, bar, request.seed, views.settings_table(done)

    def save(self, picture: Picture) -> Path:
        return generate.save_picture(picture, self.new_file(f"seed-{picture.request.seed}.png"))

    def do_cancel(self, asked: gr.Request):
        stopped = self.studio.cancel(asked.session_hash or "")
        # What is being generated says itself that it was cancelled, and must have the last word.
        return gr.skip() if stopped else views.notice("Nothing is being generated.")

    def read_recipe(self, path: str):
        request, _ = generate.read_picture(path)
        return [
            request.prompt, request.negative_prompt, request.seed, request.steps, request.guidance, request.width,
            request.height, request.strength, False,
        ]  # fmt: skip

    def origin(self, path: str) -> str:
        """With what an uploaded picture was made: its settings alone don't make it again."""
        _, source = generate.read_picture(path)
        return views.notice(f"Made with {source['weights'] or 'unknown weights'}, run {source['run'] or 'unknown'}.")

    def do_merge(self, name: str, label: str, method: str):
        run = self.library.find(name)
        checkpoint = run.find_weights(label)
        report = self.studio.merge(run, checkpoint, method)
        labels = [weights.label for weights in run.weights()]
        made = f"reslora: step {checkpoint.step} merged by {method}"
        return f"Done: **{made}** is under Generate.", views.merge_report(report), gr.update(choices=labels, value=made)

    # -- training ------------------------------------------------------------------------------------------------------

    def words(self, name, uploads, caption, folder, model, *values) -> list[str]:
        settings = dict(zip(training.FLAGS, values, strict=True)) | {"model": model}
        return self.trainings.command(name, settings, self.trainings.choose_pictures(name, folder, uploads))

    def do_show(self, *inputs) -> str:
        return training.in_words(self.words(*inputs))

    def do_start(self, *inputs):
        name, uploads, caption, folder, *_ = inputs
        words = self.words(*inputs)

        def prepare() -> None:
            if uploads:
                training.store_pictures(self.trainings.choose_pictures(name, folder, uploads), uploads, caption)

        run = self.trainings.start(name, words, prepare)
        return gr.update(choices=list(self.library.runs()), value=run.name), training.in_words(words)

    def do_stop(self, name: str) -> str:
        return views.notice(self.trainings.stop(name))

    def do_resume(self, name: str) -> str:
        self.trainings.resume(name)
        return views.notice("Going on from the newest checkpoint.")


# -- small things ------------------------------------------------------------------------------------------------------


def label_of(checkpoints: list[str]) -> str:
    return "Checkpoint" if checkpoints else "Checkpoint (this run keeps none; a run of your own does)"


def flag_widget(name: str, action):
    """The widget of a trainer's flag, with the trainer's default and help; empty means the default."""
    text, _, rest = action.help.partition(" (")
    info = f"{text} ({rest}" if action.default is None and rest else text
    common = {"label": name, "info": info, "elem_id": f"flag-{name}", "min_width": 220}
    if name == "method":
        value = ["lora", "reslora"]
        return gr.CheckboxGroup(list(action.choices), value=value, **common | {"min_width": 460})
    if action.choices:
        return gr.Dropdown(list(action.choices), value=action.default, **common)
    if name == "validation_prompt":
        return gr.Textbox(lines=2, placeholder="one prompt a line", **common | {"min_width": 460})
    return gr.Textbox("" if action.default is None else str(action.default), max_lines=1, **common)
