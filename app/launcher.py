"""Start, stop and resume `train_sd.py` in a process of its own; the page only watches what it writes.

Closing the page or the application leaves a training alone: its process id is in the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import PIL.Image

from reslora.diffusion.arguments import build_parser

from .folders import UPLOADS, Folders
from .runs import LOG_NAME, Library, Run, RunError, is_run

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "train_sd.py"
FLAGS = (
    "method",
    "shortcut",
    "pre_num",
    "head",
    "merge",
    "rank",
    "learning_rate",
    "max_train_steps",
    "train_batch_size",
    "resolution",
    "seed",
    "validation_steps",
    "checkpointing_steps",
    "validation_prompt",
)
"""The flags that are widgets; all others keep the trainer's defaults."""
MOST_IMAGES, MOST_BYTES = 2000, 1024 * 2**20
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def flags() -> dict:
    """The trainer's own definition (argparse action) of each flag in FLAGS."""
    actions = {action.dest: action for action in build_parser()._actions}
    return {name: actions[name] for name in FLAGS}


def default_output() -> Path:
    """Where a trainer without --output_dir writes."""
    return Path(build_parser().get_default("output_dir"))


def arguments(settings: dict) -> list[str]:
    """Command-line words for the settings that differ from the trainer's defaults; refuses what the trainer refuses."""
    words = []
    for name, action in flags().items():
        value = settings.get(name)
        if value in (None, "", []) or str(value) == str(action.default):
            continue
        values = value if isinstance(value, list) else [value]
        if name == "validation_prompt":
            values = [line.strip() for line in str(value).replace("\0", "").splitlines() if line.strip()]
        if action.nargs == "+" and action.type and isinstance(value, str):  # numbers with spaces between them
            values = value.split()
        values = [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values]
        if any(re.match(r"-(?!\d)", v) for v in values):  # it would be another flag
            raise RunError(f"{name} cannot begin with a hyphen.")
        if values:
            words += [f"--{name}", *values]
    check(words)
    return words


def check(words: list[str]) -> None:
    """Let the trainer's own parser refuse; its one line is the message."""
    parser = build_parser()
    parser.error = refuse  # where it would print the line and leave
    parser.parse_args(words)


def refuse(message: str) -> NoReturn:
    raise RunError(message)


class Trainings:
    """Trainings in the folder of a library."""

    def __init__(self, library: Library, data: Path | None = None) -> None:
        self.library = library
        self.images = Folders(library.folder, data)
        self.data = self.images.data
        self.started: dict[str, subprocess.Popen] = {}
        self.asked: set[int] = set()  # processes that were told to stop: a second signal would keep them from saving
        self.began: set[str] = set()  # runs whose trainer has been seen at work since it was started here
        self.lock = threading.Lock()

    def folders(self) -> list[str]:
        """Folders of images that may be chosen, by name; the bundled ones are what is trained on otherwise."""
        return [name for name, folder in self.images.all().items() if not folder.bundled]

    def command(self, name: str, settings: dict, images: Path | None = None) -> list[str]:
        """Words after `accelerate launch` for a new run of that name."""
        words = [str(SCRIPT), "--output_dir", str(self.new_folder(name))]
        if images is not None:
            words += ["--train_data_dir", str(images)]
        model = str(settings.get("model") or "").strip()
        if model:
            # A name on the hub and nothing else: a path would let the page read other folders of this machine.
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model):
                raise RunError("Give the model by its name on the hub, such as owner/model, or leave it empty.")
            if images is None:
                raise RunError("Another model needs images: upload some, or choose a folder.")
            words += ["--pretrained_model_name_or_path", model]
        return words + arguments(settings)

    def new_folder(self, name: str) -> Path:
        """Folder of a new run; `RunError` for a name that could be anything but a new folder in the runs folder."""
        if is_run(self.library.folder):
            raise RunError("This page shows a single run; start the application on a folder of runs to train here.")
        name = name if isinstance(name, str) else ""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise RunError("A run's name has letters, digits, hyphens and underscores, at most 64 of them.")
        folder = self.library.folder / name
        # What holds nothing but a log never began: its name is free again.
        began = not folder.is_dir() or any(path.name != LOG_NAME for path in folder.iterdir())
        if folder.is_symlink() or (folder.exists() and (began or self.is_active(Run(name, folder)))):
            raise RunError("There is a run of that name already; choose another name, or resume it.")
        return folder

    def choose_images(self, name: str, folder: str | None, uploads: list[str] | None) -> Path | None:
        """The folder to train on: where the uploads are to go, a folder under the data folder, or None."""
        if uploads:
            return self.library.folder / UPLOADS / self.new_folder(name).name
        return self.images.find(folder).path if folder else None

    def start(self, name: str, words: list[str], prepare: Callable[[], object] | None = None) -> Run:
        """Start the trainer for a new run and return the run; one training at a time.

        `prepare` is called first (to store the images), once it is sure that the run may start.
        """
        with self.lock:
            self.refuse_second()
            folder = self.new_folder(name)
            if prepare is not None:
                prepare()
            folder.mkdir(parents=True, exist_ok=True)
            return self._launch(Run(name, folder), words)

    def resume(self, name: str) -> Run:
        """Go on with a run that was stopped, with the settings it was started with."""
        with self.lock:
            self.refuse_second()
            run = self.library.find(name)
            if not run.config:
                raise RunError("This run never got as far as to be resumed; start a new one.")
            if not run.folder.is_relative_to(self.library.folder):
                raise RunError("The example run cannot be resumed; start a new one.")
            if run.status == "finished":
                raise RunError(f"{run.name} is finished: there is nothing to resume.")
            config = ["--config", str(run.folder / "config.json")]
            rest = ["--output_dir", str(run.folder), "--resume_from_checkpoint", "latest"]
            return self._launch(run, [str(SCRIPT), *config, *rest])

    def refuse_second(self) -> None:
        if (run := self.active()) is not None:
            raise RunError(f"{run.name} is training; wait for it, or stop it first.")

    def _launch(self, run: Run, words: list[str]) -> Run:
        self.asked.clear()
        self.began.discard(run.name)
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", *words]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": search_path()}
        with (run.folder / LOG_NAME).open("ab") as log:
            # A session of its own: Ctrl-C in the application's terminal doesn't reach it.
            self.started[run.name] = subprocess.Popen(
                launch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run.folder,
                env=environment,
                start_new_session=True,
            )
        return run

    def active(self) -> Run | None:
        """The run that is training, or about to."""
        return next((run for run in self.library.runs().values() if self.is_active(run)), None)

    def stop(self, name: str) -> str:
        """Ask a trainer to save and leave (SIGTERM), that of the run or, if it has none, the one that is at work.

        Returns a sentence saying so.
        """
        run = self.library.find(name)
        if not self.is_active(run):
            run = self.active()
        if run is None:
            return "Nothing is training."
        number, launcher = run.process, self.started.get(run.name)
        if number in self.asked:
            return f"{run.name} was told to stop already, and is saving a checkpoint."
        if number is not None:
            self.asked.add(number)
            os.kill(number, signal.SIGTERM)
            return f"{run.name} stops after this step; a checkpoint is being saved."
        if launcher is not None and run.name not in self.began:
            # The trainer hasn't begun: there is nothing to save, so the whole group goes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
            return f"{run.name} is stopped before its training began."
        return f"{run.name} is ending."

    def reader(self, folder: Path) -> Run | None:
        """The run that is training on images in a folder, above or below it, or may be: it has not said so yet."""
        run = self.active()
        if run is None or not run.config:
            return run
        read = [Path(name).resolve() for name in run.words("train_data_dir")]
        return run if any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in read) else None

    def is_active(self, run: Run) -> bool:
        """Whether the run is training, or about to."""
        launcher = self.started.get(run.name)
        return (launcher is not None and launcher.poll() is None) or run.process is not None

    def status(self, run: Run) -> str:
        """A run's status; `starting` before its trainer is at work, `stopping` once that was told to, or has left."""
        status = run.status
        if status == "running":
            self.began.add(run.name)
            return "stopping" if run.process in self.asked else "running"
        return ("stopping" if run.name in self.began else "starting") if self.is_active(run) else status

    def log(self, run: Run) -> str:
        """The end of a run's log without this machine's folders."""
        text = run.log_tail()
        names = {self.library.folder: "runs", self.data: "data", REPOSITORY: ".", Path.home(): "~"}
        names |= {Path(prefix): "python" for prefix in (sys.prefix, sys.base_prefix)}
        for path in sorted(filter(None, names), key=lambda path: -len(str(path))):
            if len(path.parts) > 1:  # not the root
                text = text.replace(str(path), names[path])
        return text


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


def store_images(folder: Path, uploads: list[str], caption: str) -> Path:
    """Copy uploaded images and captions to a new folder under names of our own.

    An image's caption is the uploaded .txt of the same name, else `caption`, else the words of its file name.
    """
    paths = [Path(upload) for upload in uploads]
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = {path.stem: path for path in paths if path.suffix.lower() == ".txt"}
    if not images:
        raise RunError(f"None of these is an image ({', '.join(IMAGE_SUFFIXES)}).")
    if len(images) > MOST_IMAGES or sum(path.stat().st_size for path in paths) > MOST_BYTES:
        raise RunError(f"At most {MOST_IMAGES} images and {MOST_BYTES // 2**20} MB, please.")
    for path in images:
        try:
            with PIL.Image.open(path) as image:
                image.verify()
        except Exception:  # a damaged file fails in as many ways as there are formats
            raise RunError(f"{path.name[:80]} is not a readable image.") from None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(images):
        words = re.sub(r"[\W_]+", " ", path.stem).strip()
        text = texts[path.stem].read_text("utf-8", "replace")[:2000] if path.stem in texts else caption or words
        shutil.copyfile(path, folder / f"{number:05d}{path.suffix.lower()}")
        (folder / f"{number:05d}.txt").write_text(text.replace("\0", "").strip(), encoding="utf-8")
    return folder
