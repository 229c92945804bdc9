"""Base class of Train and Experiment: a form that becomes a trainer command, which runs as a separate process."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import gradio as gr

from reslora.images.config_file import OF_SHORTCUTS
from reslora.images.data.caption_files import CAPTIONS
from reslora.options.option import Option

from .. import form, launcher, views
from ..bases import PIPELINES
from ..folders import BUNDLED
from ..handlers import NO_PROGRESS, QUIET, named, paths_of
from ..jobs import RUNNING, WAITING, Entry
from ..runs import Run
from ..uploads import store_images
from .base import STATUS, Parts, Tab, TabHost, answer_line, open_choice

WIDE = ("method", "validation_prompt")
ACTIVE = ("starting", "running", "stopping")
# The browser stores the form, so that a restart of the server does not clear it. The values are stored by name, because
# the server may have other options after a restart.
KEEP = """(...values) => {
    const form = Object.fromEntries(%(names)s.map((name, place) => [name, values[place]]));
    localStorage.setItem('reslora-%(id)s', JSON.stringify(form));
}"""
RECALL = """(...values) => {
    const kept = JSON.parse(localStorage.getItem('reslora-%(id)s') || '{}');
    return %(names)s.map((name, place) => name in kept ? kept[name] : values[place]);
}"""


class LaunchTab(Tab):
    """A form with its buttons: Start, Stop, Resume, Show command. Endpoints are named `<id>_start` and so on.

    A run that is started while another one trains is queued; the label of Start says so beforehand.
    """

    kind: ClassVar[type[Run]] = Run
    names: ClassVar[tuple[str, ...]]
    """Options that are always visible; the others are in collapsed groups."""
    left_out: ClassVar[tuple[str, ...]] = ()
    """Options that are not in the form."""
    filled: ClassVar[Mapping[str, object]] = {}
    """Initial values that differ from the trainer's defaults."""
    suggested: ClassVar[str]
    """Default name of a new run."""
    buttons: ClassVar[tuple[str, str, str, str]] = ("Start training", "Stop and save", "Resume", "Show command")

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.flags: dict[str, gr.components.Component] = {}

    @classmethod
    def all_names(cls) -> tuple[str, ...]:
        """Return the names of all options of the form, in order."""
        folded = form.groups((*cls.names, *cls.left_out)).values()
        return *cls.names, *(option.name for group in folded for option in group)

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Return the parameter names of the endpoints, in order."""
        return "name", "images", "caption", "folder", "model", *cls.all_names()

    def settings_column(self) -> None:
        """Make the form: the common options, then all others in collapsed groups."""
        self.name = gr.Textbox(
            self.suggested, label=f"Name of the new {self.what}", max_lines=1, elem_id=self.own("name")
        )
        self.uploads = gr.File(
            label="Your images, with .txt captions if you like (none: the bundled ones)",
            file_count="multiple", file_types=["image", *CAPTIONS], height=150, elem_id=self.own("uploads"),
            elem_classes="uploads",
        )  # fmt: skip
        self.caption = gr.Textbox("", label="Caption of images without a .txt (empty: words of the file name)")
        self.folder = open_choice("Or a folder of images on the server", value="")
        self.preview = gr.HTML(elem_id=self.own("preview"))
        self.model = open_choice(
            "Model", choices=list(PIPELINES), value="", elem_id=self.own("model"),
            info=f"Empty: {next(iter(PIPELINES))}; or a name on the hub: owner/model",
        )  # fmt: skip
        known = form.known()
        self.widgets([known[name] for name in self.names])
        for title, group in form.groups((*self.names, *self.left_out)).items():
            with gr.Accordion(title[:1].upper() + title[1:], open=False):
                self.widgets(group)
        self.flags = {name: self.flags[name] for name in self.all_names()}  # independent of their order on the page
        self.form = [self.name, self.caption, self.folder, self.model, *self.flags.values()]
        self.on_arrival = [self.folder]

    def widgets(self, options: Sequence[Option]) -> None:
        """Make a widget for each option: text boxes and choices first, then checkboxes."""
        for is_switch in (False, True):
            with gr.Row():
                for option in options:
                    if option.is_switch == is_switch:
                        self.flags[option.name] = self.widget(option)

    def widget(self, option: Option) -> gr.components.Component:
        """Return the widget of an option with the trainer's help; the placeholder is the default."""
        name = option.name
        value = self.filled.get(name, form.widget_value(option, None))
        common = {"label": form.label(option), "info": form.info(option), "elem_id": self.own(f"flag-{name}")}
        common["min_width"] = 460 if name in WIDE else 220
        if name == "method":
            return gr.CheckboxGroup(form.choices(option), value=value, **common)
        if name in OF_SHORTCUTS:
            common["visible"] = form.wires(self.filled.get("method", ()))
        if option.is_switch:
            return gr.Checkbox(bool(value), **common)
        if found := form.choices(option):
            open_choice = [("by the model", "")] if value == "" else []
            return gr.Dropdown(
                [*open_choice, *found], value=value, multiselect=isinstance(self.filled.get(name), list), **common
            )
        lines = {"lines": 2} if name == "validation_prompt" else {"max_lines": 1}
        return gr.Textbox(str(value), placeholder=form.default(option), **lines, **common)

    def buttons_row(self) -> None:
        """Make the buttons, the command and the answer line."""
        start, stop, resume, show = self.buttons
        with gr.Row(elem_classes="actions"):
            self.start = gr.Button(start, variant="primary", elem_id=self.own("start"))
            self.stop = gr.Button(stop, elem_id=self.own("stop"))
            self.resume = gr.Button(resume, elem_id=self.own("resume"))
            self.show = gr.Button(show, elem_id=self.own("show"))
        self.command = gr.Textbox(
            label="Command", lines=2, max_lines=8, buttons=["copy"], interactive=False, elem_id=self.own("command")
        )
        self.answer = answer_line(elem_id=self.own("answer"))
        self.watched = [self.start]

    def memory_button(self) -> None:
        """Make the button that estimates the memory of the training."""
        self.memory = gr.Button("Plan memory", elem_id=self.own("memory"), size="sm")

    @property
    def what(self) -> str:
        """The kind of the form's result: `run` or `experiment`."""
        return self.kind.__name__.lower()

    def own(self, name: str) -> str:
        """Return an element id that is unique among the tabs."""
        return name if self.kind is Run else f"{self.id}-{name}"

    def arrive(self) -> dict:
        """Return the folders of images on the server."""
        return {self.folder: gr.update(choices=self.jobs.folders())}

    def connect(self, page: TabHost, which: gr.components.Component, seen: gr.State) -> None:
        """Connect the form and the buttons.

        `which`: the component that selects a run; when a run is started, this run is selected. `seen`: the state at the
        last poll.
        """
        inputs = [self.name, self.uploads, self.caption, self.folder, self.model, *self.flags.values()]
        show, start, plan = (named(do, self.parameters()) for do in (self.do_show, self.do_start, self.do_plan))
        common = {"preprocess": False, **NO_PROGRESS}  # errors are shown once, as a message
        shown = self.show.click(show, inputs, self.command, api_name=f"{self.id}_command", **common)
        shown.failure(lambda: "", None, self.command, **QUIET)  # clear the command of other settings
        started = [which, self.command, self.start, self.answer]
        self.start.click(start, inputs, started, api_name=f"{self.id}_start", **common)
        self.memory.click(plan, inputs, self.answer, api_name=f"{self.id}_memory", **common)
        looked = gr.on(
            [self.folder.change, self.uploads.change], self.show_images, [self.folder, self.uploads],
            self.preview, preprocess=False, **QUIET,
        )  # fmt: skip
        looked.failure(lambda: "", None, self.preview, **QUIET)
        wired = [self.flags[flag] for flag in OF_SHORTCUTS]
        told = [self.flags[flag] for flag in self.flags if flag in form.OF_BUNDLED]
        self.model.change(self.show_defaults, self.model, told, preprocess=False, **QUIET)
        self.flags["method"].change(self.show_shortcuts, self.flags["method"], wired, **QUIET)
        kept = {"id": self.id, "names": [name for name in self.parameters() if name != "images"]}
        page.blocks.load(None, self.form, self.form, js=RECALL % kept, **QUIET)
        gr.on([part.change for part in self.form], None, self.form, None, js=KEEP % kept, **QUIET)
        # Queued, although it never has to wait: an unqueued event would not show its error.
        self.stop.click(
            self.do_stop, [which, seen], self.answer, api_name=f"{self.id}_stop", concurrency_limit=None, **NO_PROGRESS
        )
        self.resume.click(self.do_resume, which, self.answer, api_name=f"{self.id}_resume", **NO_PROGRESS)
        gr.api(self.list_names, api_name=f"{self.what}s")

    def seen(self, run: Run) -> bool:
        """Return whether a new run would wait in the queue."""
        return self.jobs.would_wait()

    def shown(self, run: Run, choice: object) -> dict:
        """Return the label of the start button."""
        return {self.start: self.start_label()}

    def start_label(self) -> str:
        """Return the label of the start button: start or queue."""
        return "Add to queue" if self.jobs.would_wait() else self.buttons[0]

    def show_shortcuts(self, methods: list[str]) -> list[dict]:
        """Return the visibility of the shortcut options: whether a selected method reads them."""
        return [gr.update(visible=form.wires(methods))] * len(OF_SHORTCUTS)

    def show_defaults(self, model: object) -> list[dict]:
        """Return the placeholders of options whose default depends on the bundled pipeline."""
        shown = [option for flag, option in form.chosen(self.all_names()).items() if flag in form.OF_BUNDLED]
        return [gr.update(placeholder=form.default(option, str(model or ""))) for option in shown]

    def settings(self, values: tuple) -> dict:
        """Return the options and their values, without those that no selected method reads."""
        settings = dict(zip(self.all_names(), values, strict=True))
        methods = settings["method"] if isinstance(settings["method"], list) else []
        unread = () if form.wires(methods) else OF_SHORTCUTS
        return {name: value for name, value in settings.items() if name not in unread}

    def words(self, name, uploads, caption, folder, model, *values) -> list[str]:
        """Return the arguments of the trainer's command line."""
        entry = Entry(name, self.what, self.settings(values) | {"model": model}, folder)
        return self.jobs.command_of(entry, paths_of(uploads), str(caption or ""))

    def do_show(self, *inputs) -> str:
        """Return the command of the form."""
        return launcher.in_words(self.words(*inputs))

    def do_plan(self, *inputs) -> Iterator[str]:
        """Yield the trainer's memory plan; nothing is trained."""
        yield views.notice("Estimating memory: this takes some seconds.")
        _, uploads, caption, *_ = inputs
        words, paths = self.words(*inputs), paths_of(uploads)
        if paths and "--train_data_dir" in words:  # a resumed experiment keeps its images
            stored = store_images(self.files.new("images"), paths, str(caption or ""))
            words[words.index("--train_data_dir") + 1] = str(stored)
        yield views.printed(self.jobs.plan(words))

    def show_images(self, folder: str, uploads) -> str:
        """Return thumbnails of the first selected images."""
        return views.thumbnails(self.jobs.first_images(folder, paths_of(uploads)))

    def do_start(self, *inputs) -> tuple:
        """Start or queue a training; return the new run, the command, the button's label and a line about it."""
        name, uploads, caption, folder, model, *values = inputs
        words = launcher.in_words(self.words(*inputs))
        settings = {flag: value for flag, value in self.settings(values).items() if value not in launcher.EMPTY}
        paths = paths_of(uploads)
        chosen = None if paths else folder or None
        entry = Entry(name, self.what, settings | {"model": str(model or "").strip()}, chosen)
        added = self.jobs.add(entry, paths, str(caption or ""))
        told = self.outcome_of(added) + launcher.warning(settings)
        if paths and added.folder not in (None, f"runs/{name}"):
            told += f" There are others in runs/{name}."
        shown = gr.update() if added.state == WAITING else gr.update(choices=self.list_names(), value=name)
        return shown, words, self.start_label(), views.notice(told)

    def outcome_of(self, entry: Entry) -> str:
        """Return a sentence on the state of an added entry, with its images if it is new."""
        where = f" on GPU {entry.device}" if entry.device is not None else ""
        named = {BUNDLED: "the bundled images", ".": "the images in the data folder"}
        images = f" with {named.get(entry.folder, f'the images in {entry.folder}')}" if entry.folder else ""
        if entry.state == RUNNING:
            begins = "goes on from its newest checkpoint" if entry.resume else "starts"
            return f"{entry.name} {begins}{where}{images}."
        return f"{entry.name} waits in the queue, and starts by itself{images}."

    def list_names(self) -> list[str]:
        """Return the names of the runs, newest first."""
        return list(self.library.runs())

    def do_stop(self, name: str, seen: tuple | None = None) -> str:
        """Stop the active training.

        If the selected run was training in the last poll, only that run is stopped, not one that started after it.
        """
        trained = seen is not None and seen[STATUS] in ACTIVE
        return views.notice(self.jobs.stop(name, self.kind, only=trained))

    def do_resume(self, name: str) -> str:
        """Resume a stopped run, or queue it."""
        run = self.jobs.find(name, self.kind)
        return views.notice(self.outcome_of(self.jobs.add(Entry(run.name, self.what, resume=True))))
