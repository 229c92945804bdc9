"""Run trainings and experiments as processes: start, queue, stop and resume them.

A training continues when the page or the application is closed; its process id is in the run's folder. The queue is a
file in the runs folder. It is only changed under a lock, so that all threads, and all applications on the same folder,
agree on what is next.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from filelock import FileLock, Timeout
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from reslora.errors import InvalidArgument
from reslora.images.data.images import SUFFIXES
from reslora.images.settings import parsed_values, resolve
from reslora.io import write_json
from reslora.options.grid import Grid
from reslora.options.images import Options
from reslora.training.stopping import SAMPLE, SAVE

from . import launcher
from .folders import BUNDLED, UPLOADS, Folders
from .launcher import ALONE, REPOSITORY, SCRIPT
from .library import REPORT, Experiment, LanguageRun, Library, kind_of, language_script, refuse_language
from .log_lock import is_held, locked_file
from .runs import EXPERIMENT_LOG, LARGEST_JSON, LOG_NAME, NOTES, Run, RunError, is_trainer
from .uploads import contents_of, keep, place_of
from .views import enumerated

FILE, LOCK = "queue.json", ".queue.lock"
KINDS: dict[str, type[Run]] = {"run": Run, "experiment": Experiment}
WAITING, RUNNING, FAILED = "waiting", "running", "failed"
EVERY, FRESH = 2.0, 1.0
"""Seconds between two polls of the queue, and seconds for which the result of `would_wait` is cached."""
MOST, MOST_ENDED = 100, 20
LONGEST = 100_000  # characters of one entry in the file
GONE = "its folder is gone: it was renamed or removed"
PATIENCE = 120.0  # seconds to wait for the lock: another change of the queue may copy a thousand images
FOLDERS = ("train_data_dir", "class_data_dir", "dataset_name")
"""Options that may name a folder of images."""
BEFORE = {LOG_NAME, EXPERIMENT_LOG, NOTES, SAVE, SAMPLE, "cache", "images.json", "logs"}
"""Files that may be in a run's folder before training begins; `cache` has encoded images."""
FEW = 8  # images in the preview
PLAN_SECONDS = 180
STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Signal that asks a trainer to save and exit. Not SIGTERM: if two applications sent it, the second SIGTERM would end
the trainer before it has saved."""


class Busy(RunError):
    """Raised if another run is training."""


def folder_name(name: str) -> str:
    """Return the name if it can be that of a visible folder in the runs folder. Raises `ValueError` otherwise."""
    if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
        raise ValueError("the name of an entry is none of a run")
    return name


@dataclass
class Entry:
    """A run or an experiment in the queue; its command is made from the form's settings when it starts."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, AfterValidator(folder_name)]
    kind: Literal["run", "experiment"] = "run"
    settings: dict = field(default_factory=dict)
    folder: str | None = None
    """Name of the image folder on the list; None means the bundled images, or for a resumed run its own images."""
    resume: bool = False
    """Whether to resume an existing run from its newest checkpoint, with its own settings."""
    state: Literal["waiting", "running", "failed", "finished", "stopped"] = WAITING
    line: str = ""
    """Why it failed, or the trainer's last line."""
    device: str | None = None
    """The GPU assigned to it, if there are several."""

    @property
    def ends(self) -> bool:
        """Whether the entry has ended."""
        return self.state not in (WAITING, RUNNING)


@dataclass
class Content:
    """The content of the queue file."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid")

    version: Literal[1]
    entries: list[Entry]


ENTRY, CONTENT = TypeAdapter(Entry), TypeAdapter(Content)


class Jobs:
    """The trainings of a runs folder: running, queued and ended."""

    def __init__(self, library: Library, data: Path | None = None) -> None:
        self.library = library
        self.images = Folders(library.folder, data)
        self.data = self.images.data
        self.path = library.folder / FILE
        self.started: dict[str, subprocess.Popen] = {}
        self.asked: set[int] = set()  # processes that were asked to stop
        self.began: set[str] = set()  # runs seen training, or stopped, since this process started them
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.busy, self.looked = False, -math.inf

    # -- what may start, and by which command --------------------------------------------------------------------------

    def folders(self) -> list[str]:
        """Return the names of the image folders without the bundled images, which are the default."""
        return [name for name, folder in self.images.all().items() if not folder.bundled]

    def command(self, name: str, settings: dict, images: Path | None = None, kind: type[Run] = Run) -> list[str]:
        """Return the arguments after `accelerate launch` for a new run, or for more runs of an existing experiment."""
        words = launcher.words_for(self.folder_of(name, kind), settings, images, self.begun(name, kind))
        if not isinstance(self.resolved(words), Grid) and kind is Experiment:
            raise RunError(ALONE)
        return words

    def resolved(self, words: list[str]) -> Options | Grid[Options]:
        """Return a command's options as the trainer resolves them. Raises `RunError` for invalid options.

        The images need not exist yet.
        """
        try:
            return resolve(parsed_values(launcher.trainers_parser(), words[1:]))
        except InvalidArgument as error:
            raise RunError(self.without_folders(str(error))) from None

    def begun(self, name: str, kind: type[Run]) -> Run | None:
        """Return the existing experiment of that name, which gets more runs; None for a new run or experiment."""
        found = self.library.named(name, kind) if kind is Experiment else None
        return found if found and found.config else None

    def kind_of(self, name: str, settings: dict) -> type[Run]:
        """Return `Experiment` for settings with several values, and for the name of an existing experiment."""
        return Experiment if self.begun(name, Experiment) or launcher.varies(settings) else Run

    def folder_of(self, name: str, kind: type[Run]) -> Path:
        """Return the output folder of the trainer."""
        return self.library.folder / name if self.begun(name, kind) else self.new_folder(name)

    def new_folder(self, name: str) -> Path:
        """Return the folder of a new run. Raises `RunError` for an invalid or existing name."""
        if self.library.is_single:
            raise RunError("This page shows a single run; start the application on a folder of runs to train here.")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise RunError("A run's name has letters, digits, hyphens and underscores, at most 64 of them.")
        folder = self.library.folder / name
        run = (kind_of(folder) or Run)(name, folder)
        began = not folder.is_dir() or not BEFORE.issuperset(run.entries())  # a folder without training can be reused
        if folder.is_symlink() or (folder.exists() and began):
            raise RunError("There is a run of that name already; choose another name, or resume it.")
        if folder.exists() and self.is_active(run):
            raise RunError(f"{name} is already starting: choose another name.")
        return folder

    def choose_images(
        self, name: str, folder: str | None, uploads: Sequence[str] | None, caption: str = "", kind: type[Run] = Run
    ) -> Path | None:
        """Return the folder to train on: that of the uploads, else the named one on the list; None is the default."""
        if uploads:
            of_run = self.library.folder / UPLOADS / self.folder_of(name, kind).name
            return place_of(of_run, contents_of(uploads, caption))
        return self.images.find(folder).path if folder else None

    def first_images(self, folder: str | None, uploads: list[str]) -> list[Path]:
        """Return the first images of a folder on the list, or of the uploads, for the preview."""
        found = list(map(Path, uploads))
        if not uploads and folder:
            chosen = self.images.find(folder)
            found = [path for path in sorted(chosen.path.glob("[!.]*")) if chosen.holds(path)]
        return [path for path in found if path.suffix.lower() in SUFFIXES][:FEW]

    def resumable(self, name: str, kind: type[Run] = Run) -> Run:
        """Return the run or experiment of that name. Raises `RunError` if it cannot be resumed."""
        run = self.find(name, kind)
        refuse_language(run)
        if not run.config:
            raise RunError("This run has nothing to resume: start a new one.")
        if not run.folder.is_relative_to(self.library.folder):
            raise RunError("The example run cannot be resumed; start a new one.")
        if run.status == "finished":
            raise RunError(f"{run.name} is finished: there is nothing to resume.")
        self.refuse_active(run)
        return run

    def plan(self, words: list[str], wanted: Callable[[], bool] = lambda: True) -> str:
        """Return the memory estimate that the trainer prints with `--plan`; nothing is trained.

        Raises `RunError` if it takes longer than `PLAN_SECONDS`, or as soon as `wanted` returns False.
        """
        process = subprocess.Popen(
            [sys.executable, *words, "--plan"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=launcher.environment(),
        )  # fmt: skip
        latest = time.monotonic() + PLAN_SECONDS
        with process:
            while True:
                try:
                    out, errors = process.communicate(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > latest or not wanted():
                        process.kill()
                        raise RunError(f"The estimate took longer than {PLAN_SECONDS} seconds.") from None
        return self.without_folders((out if process.returncode == 0 else out + errors[-2000:]).strip())

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(self, name: str, words: list[str], kind: type[Run] = Run, device: str | None = None) -> Run:
        """Start the trainer of a run or experiment that is not resumed, and return the run or experiment.

        `device`: a free GPU for the trainer. If `device` is None and another run trains, `Busy` is raised.
        """
        with self.lock:
            self.refuse_second(device)
            folder = self.folder_of(name, kind)
            folder.mkdir(parents=True, exist_ok=True)
            for log in {LOG_NAME, EXPERIMENT_LOG} - {kind.log_name}:  # left by a failed start of the other kind
                (folder / log).unlink(missing_ok=True)
            return self._launch(kind(name, folder), words, device)

    def resume(self, name: str, kind: type[Run] = Run, device: str | None = None) -> Run:
        """Resume a stopped run or experiment with its own settings."""
        with self.lock:
            self.refuse_second(device)
            run = self.resumable(name, kind)
            words = [str(SCRIPT), "--config", str(run.folder / "config.json"), "--output_dir", str(run.folder)]
            return self._launch(run, [*words, "--resume_from_checkpoint", "latest"], device)

    def refuse_active(self, *runs: Run, error: type[RunError] = RunError) -> None:
        """Raise `error` for the first of the runs that is training."""
        for run in filter(self.is_active, runs):
            raise error(f"{run.name} is training; wait for it, or stop it first.")

    def refuse_second(self, device: str | None) -> None:
        """Raise `Busy` if another run trains and `device`, a GPU for the next run, is None."""
        if device is None:
            self.refuse_active(*self.library.everything(), error=Busy)

    def _launch(self, run: Run, words: list[str], device: str | None) -> Run:
        """Start a trainer that writes to the locked log of the run, and return the run."""
        self.asked = {process for process in self.asked if is_trainer(process)}
        self.began.discard(run.name)
        for request in (SAVE, SAMPLE):  # requests that the last training did not handle
            (run.folder / request).unlink(missing_ok=True)
        with locked_file(run.folder / run.log_name) as log:
            # In a new session Ctrl-C in the application's terminal does not reach the trainer.
            self.started[run.name] = subprocess.Popen(
                [*launcher.launch_words(device), *words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, cwd=run.folder, env=launcher.environment(device), start_new_session=True,
            )  # fmt: skip
        return run

    def all_active(self) -> Iterator[Run]:
        """Return the runs and experiments that are training or starting; several only with several GPUs."""
        return (run for run in self.library.everything() if self.is_active(run))

    def is_active(self, run: Run) -> bool:
        """Return whether the run is training or starting."""
        process = self.started.get(run.name)
        ours = process is not None and process.poll() is None
        return ours or is_held(run.folder / run.log_name) or run.process is not None

    def find(self, name: str, kind: type[Run] = Run) -> Run:
        """Return the run (of any script) or experiment of that name. Raises `RunError` if there is none."""
        if kind is Experiment:
            return self.library.find_experiment(name)
        return self.library.named(name, LanguageRun) or self.library.find(name)

    def stop(self, name: str, kind: type[Run] = Run, only: bool = False) -> str:
        """Ask a trainer to save and exit, and return a sentence about it.

        If the named run is training, its trainer is asked. If it is not:
        - with `only`, `RunError` is raised, so that a run which has started since is not stopped;
        - otherwise the only active trainer is asked; if several are active, `RunError` is raised.
        """
        looked_at = self.find(name, kind)
        is_active = self.is_active(looked_at)
        if only and not is_active:
            raise RunError(f"{name} has ended; nothing was stopped.")
        found = [looked_at] if is_active else list(self.all_active())
        if not found:
            return "Nothing is training."
        if len(found) > 1:
            names = enumerated(run.name for run in found)
            raise RunError(f"{names} are training; choose the one to stop.")
        (run,) = found
        number, process = run.process, self.started.get(run.name)
        if number in self.asked:
            return f"{run.name} was asked to stop already; what is trained is saved."
        if number is not None:
            self.asked.add(number)
            os.kill(number, STOP)
            done, total = run.progress
            when = "soon" if total and done == total else "after this step"  # it is merging or comparing
            return f"{run.name} was asked to stop {when}; what is trained is saved."
        if process is None:  # started by another process of the application
            return f"{run.name} is starting, or ending; what is at work then can be stopped."
        if run.name in self.began:
            return f"{run.name} is ending."
        # Training has not begun, so there is nothing to save: end the complete process group.
        self.began.add(run.name)
        with contextlib.suppress(OSError), (run.folder / run.log_name).open("a") as log:
            log.write("\nstopped before its training began\n")  # the trainer may exit without a message
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        return f"{run.name} is stopped before its training began."

    def reader(self, folder: Path) -> Run | None:
        """Return an active run whose images are in the folder, above it or below it; None if there is none.

        An active run that has no config.json yet is returned, too, because its images are not known.
        """
        for run in self.all_active():
            read = [Path(name).resolve() for flag in FOLDERS for name in run.words(flag)]
            if not run.config or any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in read):
                return run
        return None

    def ask(self, request: str) -> str:
        """Request a checkpoint or samples after this step from all active trainers, and return a sentence."""
        why_not = {run: self.why_not_asked(run, request) for run in self.all_active()}
        asked = [run for run, why in why_not.items() if not why]
        for run in asked:
            (run.folder / request).touch()
        if not asked:
            return " ".join(why_not.values()) or "Nothing is training."
        what = {SAVE: "a checkpoint is saved", SAMPLE: "samples are generated"}[request]
        return f"{enumerated(run.name for run in asked)}: {what} after this step."

    def why_not_asked(self, run: Run, request: str) -> str:
        """Return why a run cannot handle the request now; empty if it can."""
        done, total = run.progress
        if run.process is None:
            return f"{run.name} is starting, or ending; ask once it trains."
        if script := language_script(run):
            return f"{run.name} is of {script}, which cannot be asked for that."
        if total and done == total:
            return f"{run.name} has no step to take now."
        if request == SAMPLE and run.config and not run.prompts:
            return f"{run.name} generates no samples: it has no prompts."
        return ""

    def status(self, run: Run) -> str:
        """Return a run's status, including `starting` and `stopping`, which its folder does not show."""
        status = run.status
        if status == "running":
            self.began.add(run.name)
            return "stopping" if run.process in {None, *self.asked} else "running"  # it may have just exited
        return ("stopping" if run.name in self.began else "starting") if self.is_active(run) else status

    def log(self, run: Run) -> str:
        """Return the end of a run's log without this machine's folders."""
        return self.without_folders(run.log_tail())

    def last_line(self, run: Run) -> str:
        """Return the last line of a run's log, which gives the reason if it failed."""
        return self.without_folders(run.log_tail(1))[:300]

    def without_folders(self, text: str) -> str:
        """Return text in which this machine's folders are replaced by short names."""
        names = {self.library.folder: "runs", self.data: "data", REPOSITORY: ".", Path.home(): "~"}
        names |= {Path(sys.prefix): "python", Path(sys.base_prefix): "python"}
        for path in sorted(filter(None, names), key=lambda path: -len(str(path))):
            if len(path.parts) > 1:  # skip the root folder
                text = text.replace(str(path), names[path])
        return text

    # -- the queue: its file -------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all entries of the queue in order.

        Raises `RunError` if the file cannot be read; the file is not changed then.
        """
        try:
            if not self.path.is_file():
                return []
            if self.path.stat().st_size > LARGEST_JSON:
                raise ValueError("it is too large")
            return CONTENT.validate_json(self.path.read_bytes()).entries
        except ValidationError as error:
            why = error.errors()[0]["msg"][:100]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        raise RunError(f"The queue cannot be read ({why}): repair or remove {FILE} in the folder of runs.")

    @contextlib.contextmanager
    def changing(self) -> Iterator[list[Entry]]:
        """Lock the queue and yield its entries to be changed; then write them, unless an exception was raised."""
        with writable():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_name(LOCK), timeout=PATIENCE).acquire()
        with lock:
            self.looked = -math.inf
            entries = self.entries()
            before = list(map(asdict, entries))
            for entry in entries:  # an entry that has just ended may be resumed or removed
                self.look_after(entry)
            yield entries
            old = [entry for entry in entries if entry.ends][:-MOST_ENDED]
            after = [asdict(entry) for entry in entries if entry not in old]
            if after != before:
                with writable():
                    write_json(self.path, {"version": 1, "entries": after})

    # -- the queue: actions --------------------------------------------------------------------------------------------

    def add(self, entry: Entry, uploads: Sequence[str] = (), caption: str = "") -> Entry:
        """Add an entry to the queue, start the entries that can start now, and return the added entry's new state.

        Uploaded images are stored. Raises `RunError` for settings that the trainer or the launcher would refuse, and if
        the start of the entry fails.
        """
        if self.library.is_single and entry.resume:  # a single run's folder has no queue
            self.resume(entry.name, KINDS[entry.kind])
            entry.state = RUNNING
            return entry
        self.check(entry, uploads, caption)
        with self.changing() as entries:
            self.check(entry, uploads, caption)
            live = [one.name for one in entries if not one.ends]
            if entry.name in live:
                raise RunError(f"{entry.name} is in the queue already; choose another name, or remove that one.")
            if len(live) >= MOST:
                raise RunError(f"At most {MOST} runs can wait in the queue.")
            is_new = not (entry.resume or self.begun(entry.name, KINDS[entry.kind]))
            if is_new and uploads:
                kept = keep(self.library.folder / UPLOADS / entry.name, uploads, caption)
                entry.folder = f"runs/{kept.name}"
            elif is_new:
                entry.folder = entry.folder or BUNDLED  # so that the queue shows which images are used
            entries[:] = [one for one in entries if one.name != entry.name] + [entry]
        self.advance()
        added = next((one for one in self.entries() if one.name == entry.name), entry)
        if added.state == FAILED:
            raise RunError(added.line)
        return added

    def check(self, entry: Entry, uploads: Sequence[str], caption: str) -> None:
        """Raise `RunError` for an entry that could not start even if nothing else trained."""
        try:
            written = json.dumps(asdict(entry), ensure_ascii=False).encode()
            ENTRY.validate_json(written)
        except (TypeError, ValueError, RecursionError):
            raise RunError("The settings contain a value that cannot be stored.") from None
        if len(written) > LONGEST:
            raise RunError("These settings are too long for the queue.")
        self.command_of(entry, uploads, caption)
        self.refuse_active(self.run_of(entry))

    def move(self, name: str, by: int) -> None:
        """Move a waiting entry up (-1) or down (any other number) among the waiting ones."""
        with self.changing() as entries:
            waiting = [entry for entry in entries if entry.state == WAITING]
            names = [entry.name for entry in waiting]
            if name not in names:
                raise RunError("Nothing of that name waits in the queue.")
            here = names.index(name)
            there = here + (-1 if by == -1 else 1)
            if 0 <= there < len(waiting):
                first, second = (entries.index(waiting[place]) for place in (here, there))
                entries[first], entries[second] = entries[second], entries[first]

    def remove(self, name: str) -> None:
        """Remove a waiting or ended entry. Raises `RunError` for a running one."""
        with self.changing() as entries:
            found = one_of(entries, name)
            if found.state == RUNNING:
                raise RunError(f"{name} is training; stop it instead.")
            entries.remove(found)

    def stop_entry(self, name: str) -> str:
        """Ask the trainer of a running entry, and no other trainer, to stop; return a sentence about it."""
        entry = one_of(self.entries(), name)
        if entry.state == RUNNING and not self.run_of(entry).folder.is_dir():
            raise RunError(f"{name}: {GONE}. Restore it, then stop it; otherwise the run ends without a checkpoint.")
        return self.stop(name, KINDS[entry.kind], only=True)

    def clear(self) -> None:
        """Remove all ended entries."""
        ended = {entry.name for entry in self.entries() if entry.ends}  # only those that the user saw as ended
        with self.changing() as entries:
            entries[:] = [entry for entry in entries if not (entry.ends and entry.name in ended)]

    # -- the queue: automatic start ------------------------------------------------------------------------------------

    def would_wait(self) -> bool:
        """Return whether a new entry would wait; cached for a second, because every open page asks."""
        if time.monotonic() - self.looked > FRESH:
            try:
                entries = self.entries()
                self.busy = any(entry.state == WAITING for entry in entries) or not self.free(entries)
            except RunError:
                self.busy = True  # the file cannot be read
            self.looked = time.monotonic()
        return self.busy

    def advance(self) -> None:
        """Update the states of the entries, and start waiting entries while a device is free.

        If a start fails, the next entry is started.
        """
        if all(entry.ends for entry in self.entries()):
            return
        with self.changing() as entries:
            for entry in entries:
                if entry.state == WAITING:
                    if not (free := self.free(entries)):
                        break
                    self.begin(entry, free[0])

    def look_after(self, entry: Entry) -> None:
        """Update the state of an entry from its trainer."""
        run = self.run_of(entry)
        if entry.ends:
            return
        if self.is_active(run):
            entry.state = RUNNING  # also if the application ended before it stored the state
        elif entry.state == RUNNING:
            entry.state = run.status
            line = self.last_line(run) if run.folder.is_dir() else GONE
            if isinstance(run, Experiment) and line.endswith(REPORT):  # the last line of a normal end
                line = run.time_is_over or line
            entry.line = "" if entry.state == "finished" else line

    def begin(self, entry: Entry, device: str | None) -> None:
        """Check and start an entry, or store why it failed."""
        kind = KINDS[entry.kind]
        try:
            # The state is stored after the start: if this process ends in between, the locked log shows the trainer.
            if entry.resume:
                self.resume(entry.name, kind, device)
            else:
                self.start(entry.name, self.command_of(entry), kind, device)
            entry.state, entry.device, entry.line = RUNNING, device, ""
        except Busy:
            pass  # another training was started in the meantime
        except RunError as error:
            entry.state, entry.line = FAILED, str(error)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            entry.state, entry.line = FAILED, "It could not be started; see the terminal for details."

    def command_of(self, entry: Entry, uploads: Sequence[str] = (), caption: str = "") -> list[str]:
        """Return the arguments of an entry's command after all checks; empty for a resumed run."""
        kind = KINDS[entry.kind]
        if entry.resume:
            self.resumable(entry.name, kind)
            return []
        images = self.choose_images(entry.name, entry.folder, uploads, caption, kind)
        return self.command(entry.name, entry.settings, images, kind)

    def run_of(self, entry: Entry) -> Run:
        """Return the run or experiment of an entry."""
        return KINDS[entry.kind](entry.name, self.library.folder / entry.name)

    def free(self, entries: Sequence[Entry]) -> list[str | None]:
        """Return the free devices; a training on an unknown device counts as using all of them."""
        given = {entry.name: entry.device for entry in entries if entry.state == RUNNING}
        taken = {given.get(run.name) for run in self.all_active()}
        return [] if None in taken else [device for device in devices() if device not in taken]

    def keep_going(self) -> None:
        """Start the thread that polls the queue until `closed` is set, and print how many entries wait."""
        with contextlib.suppress(RunError):
            if waiting := sum(entry.state == WAITING for entry in self.entries()):
                print(f"python -m app: {waiting} in the queue, which start by themselves", file=sys.stderr)
        threading.Thread(target=self._look_again, daemon=True).start()

    def _look_again(self) -> None:
        """Poll the queue until `closed` is set."""
        told = ""
        while True:
            problem = ""
            try:
                self.advance()
            except RunError as error:
                problem = str(error)
            except Exception as error:
                problem = f"The queue stands still: {error!r}"
            if problem not in ("", told):  # print each problem once
                print(f"python -m app: {problem}", file=sys.stderr)
            told = problem
            if self.closed.wait(EVERY):
                return


def one_of(entries: Sequence[Entry], name: str) -> Entry:
    """Return the entry of that name. Raises `RunError` if there is none."""
    for entry in entries:
        if entry.name == name:
            return entry
    raise RunError("There is nothing of that name in the queue.")


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Convert errors of the file system to a `RunError` for the page."""
    try:
        yield
    except Timeout:
        raise RunError("The queue is locked by another process; try again.") from None
    except OSError as error:
        raise RunError(f"The queue cannot be written ({error.strerror}); nothing has been changed.") from None


def devices() -> list[str | None]:
    """Return the devices for trainings that run at the same time: one GPU each, or [None] for a single training."""
    count = torch.cuda.device_count()
    if count < 2:
        return [None]
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in names.split(",")][:count]
