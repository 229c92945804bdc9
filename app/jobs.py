"""Start, queue, stop and resume runs and experiments, each trained by a separate process.

Training continues when the page or the application is closed: the trainer's process id is in the run's folder. The
queue is a file in the runs folder, so that it continues after a restart.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reslora.errors import InvalidArgument
from reslora.images.experiment.run import check_same
from reslora.images.settings import parsed_values, resolve
from reslora.io import replacing, write_json
from reslora.options.grid import Grid
from reslora.options.images import Options
from reslora.options.prompts import clean
from reslora.training.stopping import PAUSE, SAMPLE, SAVE

from . import launcher
from .bases import check_sizes
from .folders import BUNDLED, Folders
from .launcher import REPOSITORY, SCRIPT
from .library import REPORT, Experiment, Library, kind_of
from .runs import EXPERIMENT_LOG, LOG_NAME, NOTES, Run, RunError, pick, reporting

FILE = "queue.json"
KINDS: dict[str, type[Run]] = {"run": Run, "experiment": Experiment}
WAITING, RUNNING, FAILED = "waiting", "running", "failed"
EVERY = 2.0
"""Seconds between two polls of the queue."""
FOLDERS = ("train_data_dir", "conditioning_data_dir", "class_data_dir", "dataset_name")
"""Options that may name a folder of images."""
BEFORE = {LOG_NAME, EXPERIMENT_LOG, NOTES, SAVE, SAMPLE, PAUSE, "cache", "images.json", "logs"}
"""Files and folders that may be in a run's folder before training begins; `cache` contains encoded images."""
CLOSING = 10.0  # seconds to wait for captions when the application is closed
STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""Signal that asks a trainer to save and exit. SIGTERM is only used where SIGUSR1 does not exist, because a second
SIGTERM would end the trainer before it has saved."""


class Busy(RunError):
    """Raised if a run is training, so that neither this run nor another one can start."""


class NameTaken(RunError):
    """Raised if a run or experiment with the name of a new one exists."""


@dataclass
class Entry:
    """A run or an experiment in the queue; the training command is made from `settings` when the entry starts."""

    name: str
    kind: str = "run"
    """Key in `KINDS`."""
    settings: dict = field(default_factory=dict)
    folder: str | None = None
    """Name of the image folder (see `Folders`); None means the bundled images or, for a resumed run, its own images."""
    resume: bool = False
    """Whether to resume the existing run with this name, from its newest checkpoint and with its own settings."""
    state: str = WAITING
    """`waiting`, `running`, `failed`, `finished` or `stopped`."""
    line: str = ""
    """Why the entry failed, or the last line of the trainer's log."""

    @property
    def type(self) -> type[Run]:
        """The class of what is trained."""
        return KINDS[self.kind]

    @property
    def ends(self) -> bool:
        """Whether the entry has ended."""
        return self.state not in (WAITING, RUNNING)


class Jobs:
    """The running, queued and ended runs and experiments of a runs folder."""

    def __init__(self, library: Library, data: Path | None = None) -> None:
        self.library = library
        self.images = Folders(library.folder, data)
        self.path = library.folder / FILE
        self.started: dict[str, subprocess.Popen] = {}
        self.asked: set[int] = set()  # processes that were asked to stop
        self.began: set[str] = set()  # runs seen training, or stopped, since this process started them
        self.lock = threading.RLock()  # held while the queue changes or a run starts
        self.closed = threading.Event()
        self.captioning = threading.Lock()  # held while a model writes captions

    # -- what may start, and by which command --------------------------------------------------------------------------

    def folders(self) -> list[str]:
        """Return the names of all image folders except the bundled images, which are the default."""
        return [name for name, folder in self.images.all().items() if not folder.bundled]

    def command(
        self, name: str, settings: dict, folder: str | None = None
    ) -> tuple[list[str], Options | Grid[Options]]:
        """Return the arguments after `accelerate launch` for a new run, or for more runs in an existing experiment.

        The second return value has the options as the trainer resolves them, with defaults. `folder`: name of the image
        folder; None means the default. An experiment keeps its images. Raises `RunError` for invalid settings.
        """
        begun = self.begun(name)
        images = self.images.find(folder).path if folder and not begun else None
        words = launcher.words_for(begun.folder if begun else self.new_folder(name), settings, images, begun)
        try:
            found = resolve(parsed_values(launcher.trainers_parser(), words[1:]))
            check_sizes(found.base if isinstance(found, Grid) else found)
            if begun and isinstance(found, Grid):
                check_same(found)
        except InvalidArgument as error:
            raise RunError(self.without_folders(str(error))) from None
        if begun and not isinstance(found, Grid):
            raise RunError(f"{name} is an experiment: load its settings, or choose another name.")
        return words, found

    def begun(self, name: object) -> Experiment | None:
        """Return the experiment with this name, to which runs are added; None for a new run or experiment."""
        found = self.library.experiments().get(str(name))
        return found if found and found.config else None

    def new_folder(self, name: str) -> Path:
        """Return the folder for a new run or experiment. Raises `RunError` for an invalid or existing name."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise RunError("A run's name has letters, digits, hyphens and underscores, at most 64 of them.")
        folder = self.library.folder / name
        run = (kind_of(folder) or Run)(name, folder)
        began = not folder.is_dir() or not BEFORE.issuperset(run.entries())  # a folder without training can be reused
        if folder.is_symlink() or (folder.exists() and began):
            raise NameTaken("A run with this name already exists; choose another name, or resume this run.")
        if folder.exists() and self.is_active(run):
            raise NameTaken(f"{name} is already starting: choose another name.")
        return folder

    def resumable(self, name: str, kind: type[Run] = Run) -> Run:
        """Return the run or experiment with this name. Raises `RunError` if the run or experiment cannot be resumed."""
        run = self.library.find(name, kind)
        if not run.config:
            raise RunError("This run has nothing to resume: start a new run.")
        if not run.folder.is_relative_to(self.library.folder):
            raise RunError("The example run cannot be resumed; start a new run.")
        if run.status == "finished":
            raise RunError(f"{run.name} is finished: there is nothing to resume.")
        self.refuse_active(run)
        return run

    def plan(self, words: list[str]) -> str:
        """Return the memory estimate that the trainer prints with `--plan`; nothing is trained."""
        done = subprocess.run(
            [sys.executable, *words, "--plan"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env=launcher.environment(), check=False,
        )  # fmt: skip
        return self.without_folders((done.stdout + done.stderr[-2000:] * bool(done.returncode)).strip())

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(self, entry: Entry) -> Run:
        """Start or resume the run or experiment of an entry, and return it.

        Raises `Busy` if another run trains, and `RunError` as `command_of`.
        """
        with self.lock:
            self.refuse_active(*self.library.everything())
            words, run = self.command_of(entry), self.run_of(entry)
            run.folder.mkdir(parents=True, exist_ok=True)
            return self._launch(run, words)

    def refuse_active(self, *runs: Run) -> None:
        """Raise `Busy` for the first of `runs` that is training, if any."""
        for run in filter(self.is_active, runs):
            raise Busy(f"{run.name} is training; wait until it ends, or stop it first.")

    def _launch(self, run: Run, words: list[str]) -> Run:
        """Start the trainer of a run with its output in the run's log; return the run."""
        self.asked &= {active.process for active in self.all_active()}  # process ids are reused
        self.began.discard(run.name)
        # Remove requests that the last training did not handle, and the log of a failed start of the other kind (run or
        # experiment).
        for left in {SAVE, SAMPLE, PAUSE, LOG_NAME, EXPERIMENT_LOG} - {run.log_name}:
            (run.folder / left).unlink(missing_ok=True)
        with (run.folder / run.log_name).open("ab") as log:
            # In a new session Ctrl-C in the application's terminal does not reach the trainer.
            self.started[run.name] = subprocess.Popen(
                [*launcher.launch_words(), *words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, cwd=run.folder, env=launcher.environment(), start_new_session=True,
            )  # fmt: skip
        return run

    def all_active(self) -> Iterator[Run]:
        """Return the runs and experiments that are training or starting; usually one."""
        return (run for run in self.library.everything() if self.is_active(run))

    def active(self) -> Run | None:
        """Return the run or experiment that is training or starting, if any."""
        return next(self.all_active(), None)

    def is_active(self, run: Run) -> bool:
        """Return whether the run is training or starting."""
        process = self.started.get(run.name)
        return (process is not None and process.poll() is None) or run.process is not None

    def stop(self, run: Run) -> str:
        """Ask the trainer of a run to save and exit, and return a sentence about it.

        Raises `RunError` if the run is not training."""
        if not self.is_active(run):
            raise RunError(f"{run.name} has ended; nothing was stopped.")
        number, process = run.process, self.started.get(run.name)
        if number in self.asked:
            return f"{run.name} was already asked to stop; the trained steps are saved."
        if number is not None:
            self.asked.add(number)
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(number, STOP)
            done, total = run.progress
            when = "soon" if total and done == total else "after this step"  # it is merging or comparing
            return f"{run.name} was asked to stop {when}; the trained steps are saved."
        if process is None or run.name in self.began:
            return f"{run.name} is ending."
        # Training has not begun, so there is nothing to save: end the complete process group.
        self.began.add(run.name)
        with contextlib.suppress(OSError), (run.folder / run.log_name).open("a") as log:
            log.write("\nstopped before its training began\n")  # the trainer may exit without a message
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        return f"{run.name} is stopped before its training began."

    def reader(self, folder: Path) -> Run | None:
        """Return an active run that may train on images in the folder, in its parents or in its subfolders, or None.

        An active run without a config.json is also returned, because its images are not known yet.
        """
        for run in self.all_active():
            read = [Path(name).resolve() for flag in FOLDERS for name in run.words(flag)]
            if not run.config or any(path.is_relative_to(folder) or folder.is_relative_to(path) for path in read):
                return run
        return None

    def ask(self, request: str, prompts: str = "") -> str:
        """Ask the active trainer for a checkpoint (`SAVE`), samples (`SAMPLE`) or a pause (`PAUSE`) after this step.

        `prompts`: the prompts of the samples, one per line; by default the run's own prompts. `PAUSE` ends a pause if
        there is one. Returns a sentence about it, or why the trainer was not asked.
        """
        if (run := self.active()) is None:
            return "Nothing is training."
        if why := self.why_not_asked(run, request):
            return why
        if request == SAMPLE and not prompts.strip() and run.config and not run.prompts:
            return f"{run.name} has no prompts of its own; write some next to Sample now."
        if request == PAUSE and (run.folder / PAUSE).exists():
            (run.folder / PAUSE).unlink(missing_ok=True)
            return f"{run.name} continues."
        with replacing(run.folder / request) as temporary:
            temporary.write_text(clean(prompts), encoding="utf-8")
        what = {SAVE: "a checkpoint is saved", SAMPLE: "samples are generated", PAUSE: "training pauses"}[request]
        return f"{run.name}: {what} after this step."

    def why_not_asked(self, run: Run, request: str) -> str:
        """Return a sentence on why a run cannot handle the request now; empty if it can."""
        done, total = run.progress
        if run.process is None:
            return f"{run.name} is starting or ending; try again when it is training."
        if total and done == total:
            return f"{run.name} has finished its training steps."
        return ""

    def status(self, run: Run) -> str:
        """Return a run's status: `run.status`, or `starting` or `stopping`, which the run's folder does not show."""
        status = run.status
        if status == "running":
            self.began.add(run.name)
            return "stopping" if run.process in self.asked else "running"
        return ("stopping" if run.name in self.began else "starting") if self.is_active(run) else status

    def log(self, run: Run) -> str:
        """Return the last lines of a run's log, with this machine's folders replaced by short names."""
        return self.without_folders(run.log_tail())

    def last_line(self, run: Run) -> str:
        """Return the last line of a run's log, which gives the reason if the run failed."""
        return self.without_folders(run.log_tail(1))[:300]

    def without_folders(self, text: str) -> str:
        """Return `text` with this machine's folders replaced by short names."""
        names = {self.library.folder: "runs", self.images.data: "data", REPOSITORY: ".", Path.home(): "~"}
        names |= {Path(sys.prefix): "python", Path(sys.base_prefix): "python"}
        for path in sorted(filter(None, names), key=lambda path: -len(str(path))):
            if len(path.parts) > 1:  # skip the root folder
                text = text.replace(str(path), names[path])
        return text

    # -- the queue: its file -------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all entries of the queue in order. Raises `RunError` if the queue's file cannot be read."""
        try:
            content = json.loads(self.path.read_bytes()) if self.path.is_file() else {"entries": []}
            return [Entry(**entry) for entry in content["entries"]]
        except (OSError, ValueError, TypeError, LookupError) as error:
            why = f"The queue cannot be read ({type(error).__name__})"
            raise RunError(f"{why}: repair or remove {FILE} in the folder of runs.") from None

    @contextlib.contextmanager
    def changing(self) -> Iterator[list[Entry]]:
        """Lock the queue and yield its entries; when the `with` block ends without an exception, write the entries."""
        with self.lock:
            entries = self.entries()
            before = list(map(asdict, entries))
            for entry in entries:  # an entry that has just ended may be resumed or removed
                self.look_after(entry)
            yield entries
            # The queue shows no run that has ended, because the list of runs does; only a failed start stays in the
            # queue, until the user removes it.
            after = [asdict(entry) for entry in entries if not entry.ends or entry.state == FAILED]
            if after != before:
                with reporting("The queue cannot be written"):
                    write_json(self.path, {"version": 1, "entries": after})

    # -- the queue: actions --------------------------------------------------------------------------------------------

    def add(self, entry: Entry) -> Entry:
        """Start an entry if nothing trains or waits, else add it to the queue; return it with its state.

        Raises `RunError` for invalid settings, and if the entry cannot be started.
        """
        with self.changing() as entries:
            live = [one.name for one in entries if not one.ends]
            if entry.name in live:
                raise RunError(f"{entry.name} is already in the queue; choose another name, or remove that entry.")
            if live or self.active():
                self.command_of(entry)  # refuses what could not start later
                self.refuse_active(self.run_of(entry))
            else:
                self.start(entry)
                entry.state = RUNNING
            if not (entry.resume or self.begun(entry.name)):
                entry.folder = entry.folder or BUNDLED  # so that the queue shows which images are used
            entries[:] = [one for one in entries if one.name != entry.name] + [entry]
        return entry

    def remove(self, name: str) -> str:
        """Remove a waiting or ended entry; return a sentence that reports it. Raises `RunError` for a running one."""
        with self.changing() as entries:
            found = pick({entry.name: entry for entry in entries}, name, "No entry in the queue has this name.")
            if found.state == RUNNING:
                raise RunError(f"{name} is training; stop it instead.")
            entries.remove(found)
        return f"{name} is removed from the queue."

    # -- the queue: automatic start ------------------------------------------------------------------------------------

    def would_wait(self) -> bool:
        """Return whether a new entry would have to wait."""
        try:
            return self.active() is not None or any(entry.state == WAITING for entry in self.entries())
        except RunError:
            return True  # the file cannot be read

    def advance(self) -> None:
        """Update the states of all entries, and start the first waiting entry if nothing trains.

        If an entry fails to start, the next entry is started.
        """
        if all(entry.ends for entry in self.entries()):
            return
        with self.changing() as entries:
            for entry in entries:
                if entry.state == WAITING and not self.active():
                    self.begin(entry)

    def look_after(self, entry: Entry) -> None:
        """Update the state of an entry from its trainer."""
        run = self.run_of(entry)
        if entry.ends:
            return
        if self.is_active(run):
            entry.state = RUNNING  # also if the application ended before it stored the state
        elif entry.state == RUNNING:
            entry.state = run.status
            line = self.last_line(run)
            if isinstance(run, Experiment) and line.endswith(REPORT):  # a job that ends normally prints this last
                line = run.time_is_over or line
            entry.line = "" if entry.state == "finished" else line

    def begin(self, entry: Entry) -> None:
        """Check and start an entry, or store why it failed."""
        try:
            self.start(entry)
            entry.state, entry.line = RUNNING, ""
        except Busy:
            pass  # another training was started in the meantime
        except RunError as error:
            entry.state, entry.line = FAILED, str(error)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            entry.state, entry.line = FAILED, "It could not be started; see the terminal for details."

    def command_of(self, entry: Entry) -> list[str]:
        """Return the arguments of an entry's training command, and set the kind of a new entry.

        Raises `RunError` if the entry's settings or images are invalid, or if the run cannot be resumed."""
        if entry.resume:
            folder = self.resumable(entry.name, entry.type).folder
            words = [str(SCRIPT), "--config", str(folder / "config.json"), "--output_dir", str(folder)]
            return [*words, "--resume_from_checkpoint", "latest"]
        words, found = self.command(entry.name, entry.settings, entry.folder)
        entry.kind = "experiment" if isinstance(found, Grid) else "run"
        return words

    def run_of(self, entry: Entry) -> Run:
        """Return the run or experiment of an entry."""
        return entry.type(entry.name, self.library.folder / entry.name)

    def keep_going(self) -> None:
        """Start the thread that polls the queue until `closed` is set, and print how many entries wait."""
        with contextlib.suppress(RunError):
            if waiting := sum(entry.state == WAITING for entry in self.entries()):
                print(f"python -m app: {waiting} waiting in the queue; they start automatically", file=sys.stderr)
        threading.Thread(target=self._look_again, daemon=True).start()

    def close(self) -> None:
        """End the threads; wait until captions that a model has written so far are stored."""
        self.closed.set()
        self.captioning.acquire(timeout=CLOSING)

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
                problem = f"The queue cannot start runs: {error!r}"
            if problem not in ("", told):  # print each problem once
                print(f"python -m app: {problem}", file=sys.stderr)
            told = problem
            if self.closed.wait(EVERY):
                return
