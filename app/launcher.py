"""Start, stop and resume `train_sd.py` in a process of its own; the page only watches what it writes.

Closing the page or the application leaves a training alone: its process id is in the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.commands.config.config_args import default_config_file

from reslora.common.errors import InvalidArgument
from reslora.common.flags import listed
from reslora.diffusion.data.images import SUFFIXES
from reslora.diffusion.prompts import SUFFIXES as PROMPT_FILES
from reslora.diffusion.settings import build_parser, given_by, resolve
from reslora.diffusion.training.stopping import SAMPLE, SAVE
from reslora.options.grid import Grid
from reslora.options.images import Options
from reslora.options.option import Option
from reslora.options.parser import OptionsParser

from . import form
from .bases import bundled, model_of
from .folders import UPLOADS, Folders
from .held import held, is_held
from .library import Experiment, Library, kind_of, language_script, refuse_language
from .runs import EXPERIMENT_LOG, LOG_NAME, NOTES, Run, RunError, is_trainer
from .uploads import contents_of, place_of
from .views import enumerated

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "train_sd.py"
ADDED_TO = ("method", "learning_rate", "seed")
"""Options that an experiment which was begun may be given more values of."""
MAY_GROW = (*ADDED_TO, "experiment_minutes", "arms_at_once")
"""Options that need not be as an experiment was begun with."""
FOLDERS = ("train_data_dir", "class_data_dir", "dataset_name")
"""Options that may name a folder of images."""
BEFORE = {LOG_NAME, EXPERIMENT_LOG, NOTES, SAVE, SAMPLE, "cache", "images.json", "logs"}
"""What may be in a run's folder before its training begins; what is encoded is kept in `cache`."""
FEW = 8  # images to look at before a training
ALONE = "Several methods alone are a run: give several learning rates or seeds, or start it under Train."
PLAN_SECONDS = 180
STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Asks a trainer to save and leave. Another application may have asked it already: two SIGTERM would end it unsaved."""


class Busy(RunError):
    """Another run is training."""


def default_output() -> Path:
    """Where a trainer without --output_dir writes."""
    return Path(Options.of().output.output_dir)


def arguments(settings: dict, with_defaults: bool = False) -> list[str]:
    """Command-line words for the settings that differ from the trainer's defaults; refuses what its parser refuses."""
    words = []
    for name, option in form.known().items():
        value = settings.get(name)
        if value in (None, "", []) or (str(value) == str(option.fixed_default) and not with_defaults):
            continue
        if option.is_switch:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif values := words_of(option, value):
            words += [f"--{name}", *values]
    trainers_parser().parse_args(words)
    return words


def words_of(option: Option, value: object) -> list[str]:
    """A flag's value, or values, as words of a command line."""
    found = [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in listed(value)]
    if option.name == "validation_prompt":
        found = [line.strip() for line in "\n".join(found).replace("\0", "").splitlines() if line.strip()]
        if len(found) == 1 and found[0].lower().endswith(PROMPT_FILES):
            raise RunError("Files of prompts are read by train_sd.py alone; write the prompts, one a line.")
    elif option.takes_several and isinstance(value, str):  # with spaces between them; numbers may have commas, too
        found = (value.replace(",", " ") if option.parse is not str else value).split()
    if any(re.match(r"-(?!\d)", word) for word in found):  # it would be another flag
        raise RunError(f"{option.name} cannot begin with a hyphen.")
    known = () if option.choices else form.choices(option)  # the trainer imports any optimizer by its path
    if known and (wrong := [word for word in found if word not in known]):
        raise RunError(f"{option.name} {wrong[0][:80]}: choose from {', '.join(known)}.")
    return found


def trainers_parser() -> OptionsParser:
    """The trainer's own; where it refuses, its one line is the message."""
    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign] # where it would print the line and leave
    return parser


def refuse(message: str) -> NoReturn:
    raise RunError(message)


def refuse_others(begun: Run, settings: dict, images: Path | None) -> None:
    """`RunError` for what an experiment was not begun with, but for what may grow; what is not given is as it is."""
    read = [Path(name).resolve() for name in begun.words("train_data_dir")]
    if images is not None and read != [images.resolve()]:
        raise RunError(f"{begun.name} was begun with other images: choose another name, or leave the images out.")
    known, model = form.known(), str(settings.get("model") or "").strip()
    given = {flag: value for flag, value in settings.items() if flag in known and flag not in MAY_GROW}
    given = {flag: value for flag, value in given.items() if value not in (None, "", [])}
    asked, others = vars(build_parser().parse_args(arguments(given, True))), []
    for flag, value in given.items():
        was = begun.config.get(flag, known[flag].fixed_default)
        # The form has no word for some that a command line may have given: it shows them as if they were not there.
        if listed(asked.get(flag, was)) != listed(was) and value != form.widget_value(known[flag], was):
            others.append(form.as_flag(known[flag], was))
    was_model = begun.word("pretrained_model_name_or_path") or ""
    if model and model not in (was_model, bundled(was_model)):
        others.append(f"the model {bundled(was_model) or was_model}")
    if others:
        raise RunError(f"{begun.name} was begun with {', '.join(others[:5])}: give that, or choose another name.")


def with_more(begun: Run, settings: dict) -> dict:
    """What may grow of an experiment, with what a form adds; what is empty there is left out, and stays as it is."""
    more = {flag: settings[flag] for flag in MAY_GROW if settings.get(flag) not in (None, "", [])}
    asked = vars(build_parser().parse_args(arguments(more, True)))
    for flag in more.keys() & set(ADDED_TO):
        there = listed(begun.config.get(flag))
        more[flag] = [*there, *(value for value in listed(asked[flag]) if value not in there)]
    return more


class Trainings:
    """Trainings in the folder of a library."""

    def __init__(self, library: Library, data: Path | None = None) -> None:
        self.library = library
        self.images = Folders(library.folder, data)
        self.data = self.images.data
        self.started: dict[str, subprocess.Popen] = {}
        self.asked: set[int] = set()  # processes that were told to stop
        self.began: set[str] = set()  # runs whose trainer was seen at work, or told to stop, since it was started here
        self.lock = threading.Lock()

    def folders(self) -> list[str]:
        """Folders of images that may be chosen, by name; the bundled ones are what is trained on otherwise."""
        return [name for name, folder in self.images.all().items() if not folder.bundled]

    def command(self, name: str, settings: dict, images: Path | None = None, kind: type[Run] = Run) -> list[str]:
        """Words after `accelerate launch` for a new run or experiment of that name; refuses what the trainer refuses.

        An experiment that is there gets what methods, rates and seeds it has not; all else must be as it was begun.
        """
        words = [str(SCRIPT), "--output_dir", str(self.folder_of(name, kind))]
        if self.goes_on(name, kind):
            begun = self.find(name, kind)
            refuse_language(begun)
            refuse_others(begun, settings, images)
            words += ["--config", str(begun.folder / "config.json"), *arguments(with_more(begun, settings), True)]
        else:
            if settings.get("method") == []:  # the trainer would take its default
                raise RunError("Tick at least one method.")
            if images is not None:
                words += ["--train_data_dir", str(images)]
            if model := str(settings.get("model") or "").strip():
                words += ["--pretrained_model_name_or_path", model_of(model, images)]
            words += arguments(settings)
        if not isinstance(self.resolved(words), Grid) and kind is Experiment:
            raise RunError(ALONE)
        return words

    def resolved(self, words: list[str]) -> Options | Grid[Options]:
        """What the trainer makes of a command, whatever its images are: they may not be stored yet."""
        try:
            return resolve(given_by(trainers_parser(), words[1:]))
        except InvalidArgument as error:
            raise RunError(self.without_folders(str(error))) from None

    def goes_on(self, name: str, kind: type[Run]) -> bool:
        """Whether an experiment of that name is there, with the settings that it was begun with."""
        found = self.library.experiments() if kind is Experiment else {}
        return isinstance(name, str) and name in found and bool(found[name].config)

    def folder_of(self, name: str, kind: type[Run]) -> Path:
        """Where the trainer is to write."""
        return self.library.folder / name if self.goes_on(name, kind) else self.new_folder(name)

    def new_folder(self, name: str) -> Path:
        """Folder of a new run; `RunError` for a name that could be anything but a new folder in the runs folder."""
        if self.library.is_single:
            raise RunError("This page shows a single run; start the application on a folder of runs to train here.")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise RunError("A run's name has letters, digits, hyphens and underscores, at most 64 of them.")
        folder = self.library.folder / name
        run = (kind_of(folder) or Run)(name, folder)
        began = not folder.is_dir() or not BEFORE.issuperset(run.entries())  # if not, its name is free again
        if folder.is_symlink() or (folder.exists() and began):
            raise RunError("There is a run of that name already; choose another name, or resume it.")
        if folder.exists() and self.is_active(run):
            raise RunError(f"{name} is starting already: look at that one, or choose another name.")
        return folder

    def choose_images(
        self, name: str, folder: str | None, uploads: Sequence[str] | None, caption: str = "", kind: type[Run] = Run
    ) -> Path | None:
        """The folder to train on: where the uploads are to go, a folder under the data folder, or None."""
        if uploads:
            of_run = self.library.folder / UPLOADS / self.folder_of(name, kind).name
            return place_of(of_run, contents_of(uploads, caption))
        return self.images.find(folder).path if folder else None

    def start(self, name: str, words: list[str], kind: type[Run] = Run, device: str | None = None) -> Run:
        """Start the trainer for a new run or experiment, which is returned.

        `device` is the one GPU that it gets, for who knows it to be free; without one, `Busy` while another run trains.
        """
        with self.lock:
            self.refuse_second(device)
            folder = self.folder_of(name, kind)
            folder.mkdir(parents=True, exist_ok=True)
            for log in {LOG_NAME, EXPERIMENT_LOG} - {kind.log_name}:  # of what never began, and was of the other kind
                (folder / log).unlink(missing_ok=True)
            return self._launch(kind(name, folder), words, device)

    def resume(self, name: str, kind: type[Run] = Run, device: str | None = None) -> Run:
        """Go on with a run or an experiment that was stopped, with the settings it was started with."""
        with self.lock:
            self.refuse_second(device)
            run = self.resumable(name, kind)
            config = ["--config", str(run.folder / "config.json")]
            rest = ["--output_dir", str(run.folder), "--resume_from_checkpoint", "latest"]
            return self._launch(run, [str(SCRIPT), *config, *rest], device)

    def resumable(self, name: str, kind: type[Run] = Run) -> Run:
        """The run or experiment of that name; `RunError` if it cannot be resumed."""
        run = self.find(name, kind)
        refuse_language(run)
        if not run.config:
            raise RunError("This run never got as far as to be resumed; start it anew.")
        if not run.folder.is_relative_to(self.library.folder):
            raise RunError("The example run cannot be resumed; start a new one.")
        if run.status == "finished":
            raise RunError(f"{run.name} is finished: there is nothing to resume.")
        if self.is_active(run):
            raise RunError(f"{run.name} is training; wait for it, or stop it first.")
        return run

    def refuse_second(self, device: str | None = None) -> None:
        if device is None and (run := self.active()) is not None:
            raise Busy(f"{run.name} is training; wait for it, or stop it first.")

    def _launch(self, run: Run, words: list[str], device: str | None) -> Run:
        self.asked = {process for process in self.asked if is_trainer(process)}
        self.began.discard(run.name)
        for request in (SAVE, SAMPLE):  # to which nothing came any more when it trained before
            (run.folder / request).unlink(missing_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": search_path()}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with held(run.folder / run.log_name) as log:
            # A session of its own: Ctrl-C in the application's terminal doesn't reach it.
            self.started[run.name] = subprocess.Popen(
                [*launch_words(device), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run.folder,
                env=environment,
                start_new_session=True,
            )
        return run

    def active(self) -> Run | None:
        """A run or experiment that is training, or about to."""
        return next(self.all_active(), None)

    def all_active(self) -> Iterator[Run]:
        """The runs and experiments that are training, or about to: several only where there are several GPUs."""
        return (run for run in self.library.everything() if self.is_active(run))

    def find(self, name: str, kind: type[Run] = Run) -> Run:
        """The run, also of a language script, or the experiment of that name; `RunError` if there is none."""
        if kind is Experiment:
            return self.library.find_experiment(name)
        language = self.library.language_runs().get(name) if isinstance(name, str) else None
        return language or self.library.find(name)

    def stop(self, name: str, kind: type[Run] = Run, only: bool = False) -> str:
        """Ask a trainer to save and leave, that of the run or, if it has none, the one that is at work.

        `only`: that of the run alone, as it was seen to train; what has begun since it ended is left alone.
        Returns a sentence saying so.
        """
        looked_at = self.find(name, kind)
        if only and not self.is_active(looked_at):
            raise RunError(f"{name} does not train any more; nothing was stopped.")
        found = [looked_at] if only or self.is_active(looked_at) else list(self.all_active())
        if not found:
            return "Nothing is training."
        if len(found) > 1:
            names = enumerated(run.name for run in found)
            raise RunError(f"{names} are training; choose the one to stop.")
        (run,) = found
        number, launcher = run.process, self.started.get(run.name)
        if number in self.asked:
            return f"{run.name} was told to stop already; what is trained is kept."
        if number is not None:
            self.asked.add(number)
            os.kill(number, STOP)
            done, total = run.progress
            when = "soon" if total and done == total else "after this step"  # it merges, or compares
            return f"{run.name} stops {when}; what is trained is kept."
        if launcher is not None and run.name not in self.began:
            # The trainer hasn't begun: there is nothing to save, so the whole group goes.
            self.began.add(run.name)
            with contextlib.suppress(OSError), (run.folder / run.log_name).open("a") as log:
                log.write("\nstopped before its training began\n")  # a trainer may end without a word
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
            return f"{run.name} is stopped before its training began."
        if launcher is None:  # an earlier application has started it
            return f"{run.name} is starting, or ending; what is at work then can be stopped."
        return f"{run.name} is ending."

    def reader(self, folder: Path) -> Run | None:
        """The run that is training on images in a folder, above or below it, or may be: it has not said so yet."""
        for run in self.all_active():
            read = [Path(name).resolve() for flag in FOLDERS for name in run.words(flag)]
            if not run.config or any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in read):
                return run
        return None

    def plan(self, words: list[str]) -> str:
        """What the trainer says of the memory that a training would take; it trains nothing."""
        command = [sys.executable, *words, "--plan"]
        environment = os.environ | {"PYTHONPATH": search_path()}
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=PLAN_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"No plan was made within {PLAN_SECONDS} seconds.") from None
        said = done.stdout if done.returncode == 0 else done.stdout + done.stderr[-2000:]
        return self.without_folders(said.strip())

    def first_images(self, folder: str | None, uploads: list[str]) -> list[Path]:
        """A few of the images of a folder on the list, or of uploaded ones."""
        if uploads:
            found = [Path(upload) for upload in uploads]
        else:
            chosen = self.images.find(folder) if folder else None
            found = [path for path in sorted(chosen.path.glob("[!.]*")) if chosen.holds(path)] if chosen else []
        return [path for path in found if path.suffix.lower() in SUFFIXES][:FEW]

    def ask(self, request: str) -> str:
        """Ask the trainer that is at work for a checkpoint or for samples after this step, and say so."""
        found = list(self.all_active())
        if not found:
            return "Nothing is training."
        why_not = {run.name: self.why_not_asked(run, request) for run in found}
        asked = [run for run in found if not why_not[run.name]]
        if not asked:
            return " ".join(why_not.values())
        for run in asked:
            (run.folder / request).touch()
        what = {SAVE: "a checkpoint is saved", SAMPLE: "samples are drawn"}[request]
        return f"{enumerated(run.name for run in asked)}: {what} after this step."

    def why_not_asked(self, run: Run, request: str) -> str:
        """Why a run that trains could do nothing of what is asked for; empty where it can."""
        done, total = run.progress
        if run.process is None:
            return f"{run.name} is starting, or ending; ask once it trains."
        if script := language_script(run):
            return f"{run.name} is of {script}, which cannot be asked for that."
        if total and done == total:
            return f"{run.name} has no step to take now."
        if request == SAMPLE and run.config and not run.prompts:
            return f"{run.name} draws no samples: it has no prompts."
        return ""

    def is_active(self, run: Run) -> bool:
        """Whether the run is training, or about to."""
        launcher = self.started.get(run.name)
        ours = launcher is not None and launcher.poll() is None
        return ours or is_held(run.folder / run.log_name) or run.process is not None

    def status(self, run: Run) -> str:
        """A run's status; `starting` before its trainer is at work, `stopping` once that was told to, or has left."""
        status = run.status
        if status == "running":
            self.began.add(run.name)
            return "stopping" if run.process in {None, *self.asked} else "running"  # it may have just left
        return ("stopping" if run.name in self.began else "starting") if self.is_active(run) else status

    def log(self, run: Run) -> str:
        """The end of a run's log without this machine's folders."""
        return self.without_folders(run.log_tail())

    def last_line(self, run: Run) -> str:
        """What a run's trainer has printed last: where it has failed, why."""
        return self.without_folders(run.log_tail(1))[:300]

    def without_folders(self, text: str) -> str:
        """Lines of the trainer's in which this machine's folders have other names."""
        names = {self.library.folder: "runs", self.data: "data", REPOSITORY: ".", Path.home(): "~"}
        names |= {Path(prefix): "python" for prefix in (sys.prefix, sys.base_prefix)}
        for path in sorted(filter(None, names), key=lambda path: -len(str(path))):
            if len(path.parts) > 1:  # not the root
                text = text.replace(str(path), names[path])
        return text


def launch_words(device: str | None) -> list[str]:
    """`accelerate launch`, told the defaults that it would warn of; what its configuration file says holds."""
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    has_file = Path(default_config_file).is_file()
    if not has_file:
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if device is not None or (not has_file and torch.cuda.device_count() < 2):
        words += ["--num_processes", "1"]
    return words


def search_path() -> str:
    """PYTHONPATH with which the trainer finds the library although it runs in another folder."""
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def safe_name(name: str) -> str:
    """A run's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:64] or "run"


def in_words(words: list[str]) -> str:
    """The command as one would type it in the repository."""
    shown = []
    for word in words:
        path = Path(word)
        inside = path.is_absolute() and path.is_relative_to(REPOSITORY)
        shown.append(str(path.relative_to(REPOSITORY)) if inside else word)
    return "accelerate launch " + shlex.join(shown)
