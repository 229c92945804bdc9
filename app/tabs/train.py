"""Train: a form that starts a run or an experiment, trained by a separate process."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import gradio as gr

from reslora.images.config_file import OF_SHORTCUTS
from reslora.options.grid import Grid
from reslora.options.images import Options
from reslora.options.option import Option
from reslora.options.values import listed
from reslora.runtime.sample_folders import REQUESTED
from reslora.training.stopping import PAUSE, SAMPLE, SAVE

from .. import compared, experiments, form, launcher, views
from ..activity import activity_of
from ..bases import DEFAULT, PIPELINES, word_of_model
from ..downloads import new_file
from ..estimates import peak_memory, training_time
from ..folders import BUNDLED, free_name
from ..handlers import NO_PROGRESS, QUIET
from ..jobs import WAITING, Entry, NameTaken
from ..library import Experiment
from ..runs import Run, RunError
from .base import Parts, TabHost, answer_line, download, open_choice
from .control import ControlTab
from .report import ReportTab

SEARCH = Path(__file__).resolve().parents[1] / "search.js"
START = "Start training"


class TrainTab(ControlTab):
    """The tab that starts runs and experiments; several learning rates or seeds make an experiment.

    A run that is started while another run trains is queued; the label of the start button then is `Add to queue`.
    """

    names = (
        "method", "learning_rate", "seed", "rank", "max_train_steps", "train_batch_size", "resolution",
        "validation_prompt", "validation_steps",
    )  # fmt: skip
    """Options that are always visible; the others are in collapsed groups."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.flags: dict[str, gr.components.Component] = {}
        self.defaults = form.defaults({})
        # Values are saved by the option's name: a restarted server may have other options. None of them is secret.
        self.kept = gr.BrowserState({}, storage_key="reslora-train", secret="reslora", render=False)
        self.watch_panel()
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                self.settings_column()
            with gr.Column(scale=2, min_width=340, elem_id="launch"):
                self.launch_column()
        self.form = [
            self.name, self.folder, self.model, *self.flags.values(), self.more,
            self.shown_defaults,
        ]  # fmt: skip
        self.polled = [self.log, self.resume, self.panel, *self.panel_parts, self.start]
        self.on_arrival = [self.folder, self.begin]

    @classmethod
    def all_names(cls) -> tuple[str, ...]:
        """Return the names of all options of the form, in order."""
        return *cls.names, *(option.name for group in form.groups(cls.names).values() for option in group)

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Return the names of the form's components, in order."""
        return "name", "folder", "model", *cls.all_names(), "more_methods", "defaults"

    def watch_panel(self) -> None:
        """Make the panel that shows the run that is training; without one it is hidden."""
        with gr.Column(visible=False, elem_id="watch") as self.panel:
            self.training = gr.HTML(elem_id="training")
            with gr.Row(elem_classes="quiet"):
                self.stop = gr.Button("Stop and save", elem_id="stop", min_width=110)
                self.sample_now = gr.Button("Sample now", elem_id="sample-now", min_width=100)
                self.save_now = gr.Button("Save now", elem_id="save-now", min_width=90)
                self.pause = gr.Button("Pause", elem_id="pause", min_width=90)
            self.prompts = gr.Textbox(
                label="Prompts for Sample now", placeholder="One per line; empty: the run's own", max_lines=6,
                elem_id="sample-prompts",
            )  # fmt: skip
            with gr.Row():
                with gr.Column(scale=3, min_width=300):
                    self.samples = gr.HTML(elem_id="newest-samples")
                with gr.Column(scale=2, min_width=300):
                    self.curve = gr.HTML(elem_id="newest-losses")
        self.panel_parts = [self.training, *self.requests(), self.samples, self.curve]

    def requests(self) -> dict[gr.Button, str]:
        """Return the name of the file that each button requests something by."""
        return {self.sample_now: SAMPLE, self.save_now: SAVE, self.pause: PAUSE}

    def settings_column(self) -> None:
        """Make the form: the common options, then all other options in collapsed groups."""
        with gr.Row():
            self.name = gr.Textbox(
                partial(free_name, self.jobs.library.folder, "my-style"), label="Name", max_lines=1, elem_id="name",
                min_width=160,
            )  # fmt: skip
            self.begin = open_choice(
                "Start from the settings of", choices=list(form.PRESETS), value=next(iter(form.PRESETS)),
                elem_id="begin", min_width=220,
            )  # fmt: skip
        with gr.Row():
            self.model = open_choice(
                "Base model", choices=list(PIPELINES), value=DEFAULT, elem_id="model", min_width=220,
                info="A small bundled model, or a name on the Hugging Face Hub: owner/model",
            )  # fmt: skip
            self.folder = open_choice(
                "Image folder",
                choices=[BUNDLED],
                value=BUNDLED,
                min_width=220,
                info="Upload your images under Images",
                elem_id="images-of-run",
            )
        known = form.known()
        self.flags["method"] = self.widget(known["method"])
        with gr.Accordion("More methods", open=False):
            self.more = gr.CheckboxGroup(
                form.methods(False), value=[], label="More methods", show_label=False, elem_id="more-methods",
                info="To compare with, or to find out why ResLoRA is better",
            )  # fmt: skip
        self.widgets([known[name] for name in self.names[1:]])
        with gr.Accordion("All options", open=False):
            script = SEARCH.read_text(encoding="utf-8")
            gr.HTML(views.search(form.index(self.names)), elem_id="search", js_on_load=script)
            for number, (title, group) in enumerate(form.groups(self.names).items()):
                with gr.Accordion(title[:1].upper() + title[1:], open=False, elem_id=form.GROUP % number):
                    self.widgets(group)
        self.flags = {name: self.flags[name] for name in self.all_names()}  # independent of their order on the page
        self.shown_defaults = gr.JSON(self.defaults, visible="hidden")

    def launch_column(self) -> None:
        """Make the number of runs, the buttons, the command and the log."""
        self.plan = gr.HTML(elem_id="train-plan")
        with gr.Row(elem_classes="actions"):
            self.facts = gr.HTML(elem_id="facts")
            self.start = gr.Button(START, variant="primary", elem_id="start", min_width=130)
            self.resume = gr.Button("Resume", elem_id="resume", min_width=80, interactive=False)
        self.answer = answer_line(elem_id="answer")
        self.command = gr.Textbox(
            label="Command", lines=2, max_lines=8, buttons=["copy"], interactive=False, elem_id="command",
            elem_classes="code",
        )  # fmt: skip
        with gr.Row(elem_classes="quiet"):
            self.memory = gr.Button("Estimate memory", elem_id="memory", size="sm", min_width=120)
            self.save_config = gr.Button("Save configuration", elem_id="save-config", size="sm", min_width=140)
        self.log = gr.HTML(elem_id="log")
        gr.Markdown(
            "Training runs as a separate process: you can close this page. **Stop and save** writes a checkpoint, and "
            "**Resume** continues from it. Afterwards, samples and losses are under **Compare**.",
            elem_classes="hint",
        )

    def widgets(self, options: Sequence[Option]) -> None:
        """Make a component for each option: text boxes and choices first, then checkboxes."""
        for is_switch in (False, True):
            with gr.Row(elem_classes="options"):
                for option in options:
                    if option.is_switch == is_switch:
                        self.flags[option.name] = self.widget(option)

    def widget(self, option: Option) -> gr.components.Component:
        """Make the component of an option, with the option's default and help."""
        name = option.name
        common = {"label": form.label(option), "info": form.info(option), "elem_id": f"flag-{name}"}
        if name in OF_SHORTCUTS:
            common["visible"] = form.wires(self.defaults["method"])
        value = self.defaults[name]
        if name == "method":
            return gr.CheckboxGroup(form.methods(True), value=value, **common)
        if option.is_switch:
            return gr.Checkbox(value, **common)
        if found := form.choices(option):
            unset = [(form.UNSET, "")] if value == "" else []
            return gr.Dropdown([*unset, *found], value=value, multiselect=isinstance(value, list), **common)
        lines = {"lines": 2} if name == "validation_prompt" else {"max_lines": 1}
        return gr.Textbox(value, placeholder=form.in_empty_box(option), **lines, **common)

    # -- events --------------------------------------------------------------------------------------------------------

    def arrive(self) -> dict:
        """Return the choices of image folders, and of presets, runs and experiments with settings, by component."""
        settings = [*form.PRESETS, *self.library.runs(), *self.library.experiments()]
        folders = gr.update(choices=[BUNDLED, *self.jobs.folders()])
        return {self.folder: folders, self.begin: gr.update(choices=settings)}

    def events(self, page: TabHost) -> None:
        """Connect the components."""
        self.control(page.run)
        inputs = self.form
        self.kept.render()  # here, because the browser makes the parts of a tab only when the tab is opened
        changes = [part.change for part in self.form[:-1]]
        page.blocks.load(self.recall, [self.kept, *self.form], self.form, preprocess=False, **QUIET)
        following = [self.flags[name] for name in form.FOLLOWING]
        wired = [self.flags[name] for name in OF_SHORTCUTS]
        gr.on(
            [page.frames[self].select, *changes, self.shown_defaults.change], self.look, inputs,
            [self.kept, self.plan, self.facts, self.command, self.shown_defaults, *following, *wired],
            trigger_mode="always_last", queue=False, preprocess=False, **QUIET,
        )  # fmt: skip

        common = {"preprocess": False, **NO_PROGRESS}  # errors are shown once, as a message
        started = [page.run, page.tab(ReportTab).which, self.start, self.answer]
        self.start.click(self.do_start, inputs, started, api_name="train_start", **common)
        self.memory.click(self.do_plan, inputs, self.answer, api_name="train_memory", **common)
        download(self.save_config, self.do_save, inputs, "save_config")
        # Not `input`: it is also triggered when the box loses the focus, and would overwrite the form.
        filled = [self.shown_defaults, self.model, self.folder, *self.flags.values(), self.more]
        self.begin.change(self.fill, self.begin, filled, trigger_mode="always_last", **QUIET)
        for button, request in self.requests().items():
            needed = {"inputs": self.prompts if request == SAMPLE else None, "outputs": self.answer}
            api_name = f"train_{request.replace('.', '_')}"
            button.click(partial(self.ask, request), **needed, api_name=api_name, concurrency_limit=None, **NO_PROGRESS)

    def recall(self, kept: object, *values: object) -> list:
        """Return the form's values that the browser has stored, and no update for those that are the same."""
        stored = kept if isinstance(kept, dict) else {}
        present = zip(self.parameters(), values, strict=True)
        return [stored[name] if stored.get(name, value) != value else gr.skip() for name, value in present]

    def fill(self, name: str) -> list:
        """Return the form's values for the settings of a preset, run or experiment; a preset leaves the image folder.

        Raises `RunError` if the page cannot select the run's model.
        """
        runs = self.library.runs() | self.library.experiments()
        settings = form.settings_of(name, runs)
        folder = gr.update() if name in form.PRESETS else self.jobs.images.of_run(runs[name]) or BUNDLED
        model, (*values, defaults) = word_of_model(name, settings), self.values_of(settings)
        return [defaults, model or DEFAULT, folder, *values]

    def values_of(self, settings: dict) -> list:
        """Return the form's values for these settings: all options, more methods, and the defaults."""
        values = form.values_of(settings)
        more = [name for name in values["method"] if name not in form.FIRST]
        values["method"] = [name for name in values["method"] if name in form.FIRST]
        return [*(values[name] for name in self.all_names()), more, form.defaults(settings)]

    def ask(self, request: str, prompts: str = "") -> str:
        """Ask the active run for a checkpoint, samples or a pause after the current step, and return a notice."""
        return views.notice(self.jobs.ask(request, str(prompts or "")))

    # -- the form's settings -------------------------------------------------------------------------------------------

    def settings(self, name: object, model: object, values: Sequence) -> dict:
        """Return the form's model, methods, and the options that differ from the form's defaults.

        Shortcut options are left out if no selected method uses them. For an existing experiment, options with default
        values are included, because they may differ from the experiment's settings.
        """
        *flags, more, defaults = values
        begun, model = self.jobs.begun(name), str(model or "").strip()
        model = "" if model == DEFAULT and not begun else model
        settings = dict(zip(self.all_names(), flags, strict=True)) | {"model": model}
        methods = [*listed(settings["method"]), *listed(more)]
        left_out = {} if form.wires(methods) else dict.fromkeys(OF_SHORTCUTS)
        if isinstance(defaults, dict) and not begun:
            left_out |= {flag: None for flag, value in settings.items() if value == defaults.get(flag, ())}
        found = {flag: value for flag, value in settings.items() if flag not in left_out}
        return found | {"method": methods}

    def entry(self, name, folder, model, *values) -> Entry:
        """Return an entry of the queue with the form's settings."""
        settings = self.settings(name, model, values)
        given = {flag: value for flag, value in settings.items() if flag == "method" or value not in launcher.EMPTY}
        return Entry(name, settings=given, folder=without_bundled(folder))

    def look(self, name, folder, model, *values) -> dict:
        """Return updates of the page for the form's values, by component.

        The updates set the number of runs, their time and the command (or what is wrong with the form), options that
        are visible only with shortcuts, and defaults that depend on other options.
        """
        settings, shown = self.settings(name, model, values), values[-1] if isinstance(values[-1], dict) else {}
        wired = gr.update(visible=form.wires(settings["method"]))
        kept = dict(zip(self.parameters(), (name, folder, model, *values), strict=True))
        updates = {self.kept: kept} | {self.flags[flag]: wired for flag in OF_SHORTCUTS}
        try:
            told, words, found = experiments.plan(self.jobs, name, settings, without_bundled(folder))
            now = form.defaults(given_in(found))
        except RunError as error:
            told = {self.plan: views.bad(form.without_flags(str(error))), self.command: ""}
            if isinstance(error, NameTaken) and name in self.jobs.started:  # the command is that of the start
                told = {self.plan: views.notice(f"{name} was started. To start another run, give another name.")}
            return updates | told | {self.facts: ""}
        flags = dict(zip(self.all_names(), values[:-2], strict=True))
        for flag in form.FOLLOWING:
            if now[flag] != shown.get(flag) == flags[flag]:
                updates[self.flags[flag]] = now[flag]
        facts = {"Time": training_time(self.library, found)}
        return updates | {
            self.plan: told, self.facts: views.facts(facts), self.command: launcher.in_words(words),
            self.shown_defaults: now,
        }  # fmt: skip

    def do_plan(self, *inputs) -> Iterator[str]:
        """Yield a notice, then the trainer's memory estimate (`--plan`), as HTML; nothing is trained."""
        yield views.notice("Estimating memory; this takes a few seconds.")
        planned = self.jobs.plan(self.jobs.command_of(self.entry(*inputs)))
        peak = f"Weights, gradients and activations: {peak_memory(planned)}. Python and its libraries need more."
        yield views.notice(peak) + views.printed(planned)

    def do_start(self, *inputs) -> tuple:
        """Start or queue the form's run or experiment.

        Return updates of the run and experiment dropdowns, the start button's label, and a notice.
        """
        added = self.jobs.add(self.entry(*inputs))
        told = self.outcome_of(added)
        run = experiment = gr.update()
        if added.kind == "experiment":
            experiment = gr.update(choices=list(self.library.experiments()), value=added.name)
            told += " Its report is under Compare, Experiment."
        elif added.state != WAITING:
            run = gr.update(choices=self.list_names(), value=added.name)
        return run, experiment, self.start_label(), views.notice(told)

    def do_save(self, *inputs) -> str:
        """Return the path of a TOML file with the form's settings, for `train_sd.py --config`."""
        entry = self.entry(*inputs)
        settings = launcher.parsed(entry.settings)
        if entry.folder:
            settings["train_data_dir"] = str(self.jobs.images.find(entry.folder).path)
        path = new_file(f"{launcher.safe_name(str(entry.name))}.toml")
        lines = (f"{flag} = {json.dumps(value, ensure_ascii=False)}\n" for flag, value in settings.items())
        text = "".join(lines).replace("\x7f", "\\u007f")  # as TOML demands
        path.write_text(text, encoding="utf-8", errors="replace")
        return str(path)

    def do_stop(self, name: str) -> str:
        """Stop what is training, whichever run is selected; return a notice."""
        active = self.jobs.active()
        return views.notice(self.jobs.stop(active) if active else "Nothing is training.")

    # -- polls ---------------------------------------------------------------------------------------------------------

    def seen(self, run: Run) -> bool:
        """Return whether a new run would have to wait in the queue."""
        return self.jobs.would_wait()

    def shown(self, run: Run, choice: object) -> dict:
        """Return the update of the start button's label, by component."""
        return {self.start: self.start_label()}

    def start_label(self) -> str:
        """Return the label of the start button, which says whether a new run starts or is queued."""
        return "Add to queue" if self.jobs.would_wait() else START

    def live_state(self, run: Run) -> object:
        """Return the state of the run that is training."""
        active = self.jobs.active()
        return active and (
            active.name,
            self.jobs.status(active),
            activity_of(active),
            active.fingerprint(),
            requested(active),
        )

    def updates(self, run: Run, status: str) -> dict:
        """Return the run's log, which buttons do something, and the panel of the run that is training."""
        can_resume = status == "stopped" and run.folder.is_relative_to(self.library.folder)
        found = {self.log: views.log(self.jobs.log(run), status), self.resume: gr.update(interactive=can_resume)}
        active = self.jobs.active()
        shown = self.watched_run(active, run) if active else {}
        return found | {self.panel: gr.update(visible=active is not None)} | shown

    def watched_run(self, run: Run, selected: Run) -> dict:
        """Return the newest samples and the loss curve of a run, and which requests it can handle.

        The progress of the run is only added if the run is not `selected`, because the top of the page shows the
        progress of the selected run.
        """
        status = self.jobs.status(run)
        buttons = {
            button: gr.update(interactive=not self.jobs.why_not_asked(run, request))
            for button, request in self.requests().items()
        }
        buttons[self.pause]["value"] = "Continue" if (run.folder / PAUSE).exists() else "Pause"
        if isinstance(run, Experiment):
            shown = experiments.summary(run, status), views.notice("Its report is under Compare, Experiment."), ""
        else:
            step = max(run.steps(), default=0)
            split = "validation" if len(run.steps()) > 1 else "train"  # one point is no curve
            curve = compared.curves(run, split, step) or compared.curves(run, "train", step)
            shown = views.summary(run, status), compared.images(run, step, status), curve
        progress, samples, curve = shown
        named = "" if run == selected else f"<h3>{views.escape(run.name)}</h3>{progress}"
        samples = views.thumbnails(requested(run)) + samples
        return buttons | {self.training: named, self.samples: samples, self.curve: curve}


def requested(run: Run) -> list[Path]:
    """Return the images of the newest request for samples of other prompts."""
    folders = [path for path in run.folder.glob(f"*/{REQUESTED}/step-*/*") if path.is_dir()]
    newest = max(folders, key=lambda path: path.stat().st_mtime, default=None)
    images = sorted(newest.glob("*.png")) if newest else []
    return [path for image in images if (path := run.inside(*image.relative_to(run.folder).parts))]


def given_in(found: Options | Grid[Options]) -> dict[str, object]:
    """Return the options on which defaults depend: the model, the optimizer, and those with several values."""
    base, varied = (found.base, found.varied) if isinstance(found, Grid) else (found, {})
    return {form.MODEL: base.model.pretrained_model_name_or_path, "optimizer": base["optimizer"]} | varied


def without_bundled(folder: object) -> object:
    """Return the name of an image folder, or None for the bundled images, with which their other defaults apply."""
    return None if folder in ("", BUNDLED) else folder
