"""Read the output folders of `train_sd.py`, even while training writes to them.

Names from a browser are only compared with the names in a folder. All links are resolved before a file is opened, so
that no file outside of the run's folder is read.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import psutil

from reslora.checkpoint import WEIGHTS_NAME
from reslora.checks import is_subtracted
from reslora.export import COMFYUI_FILE, DIFFUSERS_FILE, KOHYA_FILE
from reslora.io import has_ended, read_object, this_process
from reslora.methods.adapters import ADAPTER_NAME
from reslora.methods.registry import METHODS
from reslora.options.values import listed
from reslora.runtime.log import of_split, read_log
from reslora.runtime.sample_folders import PROMPTS, by_step, is_of
from reslora.runtime.status import FILE as STATUS

T = TypeVar("T")
EXAMPLE = Path(__file__).resolve().parent / "example"
"""Folder of the example: a small finished run that is part of the application."""
LOG_NAME, EXPERIMENT_LOG = "app.log", "experiment.log"
"""Names of the log file of a trainer that the page started: for a run, and for an experiment."""
NOTES = "notes.txt"
"""Name of the file with the user's notes on a run."""
LONGEST_NOTES = 2000
NO_CONFIG = "its config.json cannot be read"
LORA_FILES = (DIFFUSERS_FILE, KOHYA_FILE, COMFYUI_FILE)
DENOISERS, ENCODERS = ("unet", "transformer"), ("text_encoder", "text_encoder_2")
LARGEST_JSON = 64 * 2**20
MOST_STEPS = 10**9


def is_alive(process: str) -> bool:
    """Return whether the process with this identifier from `this_process` is on this machine and has not ended.

    Raises `ValueError` for a damaged identifier.
    """
    host, number, _ = process.split("-")
    return host == this_process().partition("-")[0] and psutil.pid_exists(int(number)) and not has_ended(process)


class RunError(ValueError):
    """An error to show on the page; the message is one sentence without paths of the server."""


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Convert an `OSError` to a `RunError` that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{what} ({error.strerror}).") from None


def pick(known: Mapping[str, T], name: object, otherwise: str) -> T:
    """Return the item with a name that a browser has sent. Raises `RunError(otherwise)` if no item has this name."""
    if not isinstance(name, str) or name not in known:
        raise RunError(otherwise)
    return known[name]


def number(value) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return value if math.isfinite(value) else None
    return None


def stamp_of(path: Path | None) -> tuple[int, ...]:
    """Return inode, size in bytes and modification time of a file; empty if it does not exist."""
    with contextlib.suppress(OSError):
        if path:
            status = path.stat()
            return status.st_ino, status.st_size, status.st_mtime_ns
    return ()


@dataclass(frozen=True)
class Call:
    """A call of a cached function; two calls with equal state have the same result."""

    state: Hashable
    given: tuple = field(compare=False)


def cached_by(state: Callable[..., Hashable], size: int) -> Callable:
    """Cache the results of a function for `size` calls, by the value of `state` for the same arguments."""

    def decorate(function: Callable) -> Callable:
        """Return `function` with a cache."""
        known = functools.lru_cache(size)(lambda call: function(*call.given))
        return functools.wraps(function)(lambda *given: known(Call(state(*given), given)))

    return decorate


def cached_by_stamp(size: int) -> Callable:
    """Cache the results of a function of a path and other arguments for `size` calls, each until its file changes."""
    return cached_by(lambda path, *given: (path, stamp_of(path), *given), size)


@dataclass(frozen=True)
class Weights:
    """Weights to generate images with."""

    label: str
    kind: str
    """`base`, `merged` (a complete denoiser), `adapter` (an unmerged checkpoint) or `file` (an exported LoRA)."""
    method: str = ""
    path: Path | None = None
    step: int | None = None
    encoders: tuple[tuple[str, Path], ...] = ()
    """Names and paths of the trained text encoders; empty for a LoRA file, which contains the encoders' weights."""


BASE = Weights("base model", "base")


@dataclass(frozen=True)
class Run:
    """One output folder of the trainer."""

    name: str
    folder: Path
    log_name: ClassVar[str] = LOG_NAME

    @functools.cached_property
    def resolved(self) -> Path:
        """The run's folder, with links resolved."""
        return self.folder.resolve()

    def inside(self, *parts: str) -> Path | None:
        """Return the resolved path of a file or folder of this run.

        `parts`: path relative to the run's folder. The result is None if the path does not exist or leads out of the
        folder.
        """
        try:
            path = self.folder.joinpath(*parts).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return None
        regular = path.is_file() or path.is_dir()
        return path if regular and path.is_relative_to(self.resolved) else None

    def read_json(self, *parts: str) -> dict:
        """Return the JSON object in a file of this run; empty if the file is missing, damaged or too large."""
        path = self.inside(*parts)
        with contextlib.suppress(OSError):
            if path and path.stat().st_size <= LARGEST_JSON:
                return object_in(path)
        return {}

    def text(self, *parts: str) -> str:
        """Return the content of a text file of this run; empty if the file is missing or too large."""
        path = self.inside(*parts)
        with contextlib.suppress(OSError):
            if path and path.stat().st_size <= LARGEST_JSON:
                return path.read_text(encoding="utf-8", errors="replace")
        return ""

    def entries(self, *parts: str) -> list[str]:
        """Return the sorted names of the files and folders, without hidden ones, in a folder of this run."""
        path = self.inside(*parts)
        with contextlib.suppress(OSError):  # such as a file
            if path:
                return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        return []

    def sound(self, *parts: str) -> Path | None:
        """Return the path of a folder of this run, or None if it contains a link to outside of the run's folder."""
        return self.inside(*parts) if all(self.inside(*parts, name) for name in self.entries(*parts)) else None

    # -- settings and state --------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict:
        """The run's options in config.json, not validated; empty until the trainer has written the file."""
        return self.read_json("config.json")

    @property
    def unreadable(self) -> bool:
        """Whether config.json is damaged, so that the run's model and method are unknown."""
        return not self.config and self.inside("config.json") is not None

    def words(self, flag: str) -> list[str]:
        """Return the text values of an option."""
        return [word for word in listed(self.config.get(flag)) if isinstance(word, str)]

    def word(self, flag: str) -> str | None:
        """Return the first text value of an option, or None."""
        return next(filter(None, self.words(flag)), None)

    def first(self, flag: str) -> object:
        """Return the value of an option, or the first of several values; None if the option was not given."""
        return next(iter(listed(self.config.get(flag))), None)

    @property
    def methods(self) -> list[str]:
        """Names of this run's methods in the order of training."""
        configured = self.words("method")
        names = dict.fromkeys([*configured, *self.entries()])
        folders = {name for name in names if (path := self.inside(name)) and path.is_dir()}
        return [name for name in names if name in METHODS and (name in configured or name in folders)]

    @property
    def titles(self) -> list[str]:
        """Titles of this run's methods, for the page."""
        return [METHODS[method].title for method in self.methods]

    @property
    def prompts(self) -> list[str]:
        """Prompts of the samples."""
        return self.words("validation_prompt")

    @property
    def process(self) -> int | None:
        """Process id of the trainer that is running in this folder, or None."""
        process = self.text(".lock").partition("\n")[2].strip()
        with contextlib.suppress(ValueError, OverflowError):  # a damaged file
            return int(process.split("-")[1]) if is_alive(process) else None
        return None

    @property
    def activity(self) -> dict:
        """The content of the trainer's status file; empty if no trainer is running or the file does not exist yet."""
        told, process = self.read_json(STATUS), self.process
        return told if process and told.get("process") == process else {}

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` (the run can be resumed) or `failed` (training never began)."""
        if self.process:
            return "running"
        if not self.config:
            return "failed"
        done, total = self.progress
        exported = all(self.record(method).get("step") == self.steps_of(method) for method in self.methods)
        return "finished" if total and done >= total and exported else "stopped"

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done and total steps, summed over the methods."""
        return sum(map(self.steps_done, self.methods)), sum(map(self.steps_of, self.methods))

    def steps_done(self, method: str) -> int:
        """Return how many steps of a method are done."""
        return min(self.steps_of(method), max((row["step"] for row in self.log(method)), default=0))

    def steps_of(self, method: str) -> int:
        """Return a method's total number of steps or, after early stopping, its number of completed steps."""
        steps, record = number(self.config.get("max_train_steps")) or 0, self.record(method)
        steps = int(steps) if 1 <= steps <= MOST_STEPS else 0
        patience = record.get("early_stopping_patience")  # with another patience, training is not over
        ended = number(record.get("step")) if patience and patience == self.config.get("early_stopping_patience") else 0
        return min(steps, int(ended or steps))

    def record(self, method: str) -> dict:
        """Return the content of a method's exports.json; empty until the method is exported."""
        return self.read_json(method, "exports.json")

    # -- samples and logs ----------------------------------------------------------------------------------------------

    def log(self, method: str) -> list[dict]:
        """Return the rows of a method's `log.jsonl` whose loss is finite.

        The keys of a row are step, split, loss, lr and seconds."""
        path = self.inside(method, "log.jsonl")
        return list(rows_of(path)) if path and path.is_file() else []

    def steps(self) -> list[int]:
        """Return the steps at which any method has samples.

        For a run without prompts, return the steps with a validation loss, and the last step.
        """
        found: set[int] = set()
        for method in self.methods:
            with contextlib.suppress(OSError):  # the folder has just been moved or removed
                if path := self.inside(method, "samples"):
                    found |= by_step(path).keys()
        if not found and not self.prompts:
            rows = [row for method in self.methods for row in self.log(method)]
            last = max((row["step"] for row in rows), default=0)
            found = {row["step"] for row in of_split(rows, "validation")} | {last}
        return sorted(found)

    def nearest(self, step: float | None) -> int:
        """Return the step among `steps()` that is nearest to `step`, or 0 if there is none."""
        wanted = number(step) or 0
        return min(self.steps(), key=lambda found: abs(found - wanted), default=0)

    def samples(self, method: str, step: int | None) -> dict[tuple[int, int], Path]:
        """Return the paths of the sample images at a step, by (prompt, image) index.

        If `step` is None, the samples are those of the merged weights. If the run was resumed with other prompts,
        samples of the earlier prompts are left out.
        """
        folder = (method, "merged") if step is None else (method, "samples", f"step-{step:06d}")
        record, prompts, found = self.read_json(*folder, PROMPTS), dict(enumerate(self.prompts)), {}
        for name in self.entries(*folder):
            match = re.fullmatch(r"(\d{1,5})-(\d{1,5})\.png", name)
            path = self.inside(*folder, name) if match else None
            if path and is_of(record, number := int(match[1]), prompts.get(number)):
                found[number, int(match[2])] = path
        return found

    def fingerprint(self) -> tuple:
        """Return a value that changes if the page has to show the run again."""
        names = ("log.jsonl", "merged", "merge.json")
        stamps = [stamp_of(self.inside(method, name)) for method in self.methods for name in names]
        return self.status, tuple(self.steps()), *stamps

    def log_tail(self, lines: int = 40) -> str:
        """Return the last `lines` lines of the trainer's output; progress bars are reduced to their latest state."""
        path = self.inside(self.log_name)
        if path is None or not path.is_file():
            return ""
        try:
            with path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 32768))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:  # it has just been moved or removed
            return ""
        shown = [line.rstrip().rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
        return "\n".join([line for line in shown if line.strip()][-lines:])

    @property
    def notes(self) -> str:
        """The user's notes on the run. Notes that are too long are cut to `LONGEST_NOTES + 1` characters."""
        return self.text(NOTES)[: LONGEST_NOTES + 1]

    # -- weights -------------------------------------------------------------------------------------------------------

    def weights(self) -> list[Weights]:
        """Return the base model, then for each method: merged weights, LoRA files, checkpoints (newest first)."""
        found = [BASE]
        for method in () if self.unreadable else self.methods:  # the base model of the weights is unknown
            found += [*self.merged(method), *self.lora_files(method), *self.checkpoints(method)]
        return found

    def merged(self, method: str) -> list[Weights]:
        """Return a method's merged weights, with trained text encoders; empty until a merge has written all of them."""
        if self.config.get("train_text_encoder") and not self.record(method):
            return []
        parts = [part for part in DENOISERS if self.inside(method, part, "config.json")]
        if not parts or (encoders := self.encoders(method)) is None:
            return []
        paths = [path for part in parts if (path := self.sound(method, part))]
        label = f"{METHODS[method].title}: merged weights"
        return [Weights(label, "merged", method, path, encoders=encoders) for path in paths]

    def lora_files(self, method: str) -> list[Weights]:
        """Return a method's exported LoRA files."""
        files = {name: self.inside(method, name) for name in self.entries(method) if name in LORA_FILES}
        title = METHODS[method].title
        return [Weights(f"{title}: {name}", "file", method, path) for name, path in files.items() if path]

    def checkpoints(self, method: str) -> list[Weights]:
        """Return the complete checkpoints of a LoRA or ResLoRA method, newest first.

        Checkpoints of PiSSA and OLoRA are left out, because their factors do not add to the model's own weights."""
        row, init = METHODS[method], self.config.get("init_lora_weights")
        wanted = WEIGHTS_NAME if row.shortcuts else ADAPTER_NAME
        found = []
        for name in self.entries(method) if row.trains_lora else ():
            if row.reads_initialization and is_subtracted(init):
                break
            match = re.fullmatch(r"checkpoint-(\d{1,9})", name)
            path = self.sound(method, name) if match else None
            complete = self.inside(method, name, "trainer.json") and self.inside(method, name, wanted)
            encoders = self.encoders(method, name) if path and complete else None
            if encoders is not None:
                step, title = int(match[1]), METHODS[method].title
                found.append(Weights(f"{title}: unmerged, step {step}", "adapter", method, path, step, encoders))
        return sorted(found, key=lambda weights: -weights.step)

    def encoders(self, *parts: str) -> tuple[tuple[str, Path], ...] | None:
        """Return names and paths of the text encoders in a folder of this run.

        The result is None if a text encoder contains a link to outside of the run's folder."""
        found = tuple((name, self.sound(*parts, name)) for name in self.entries(*parts) if name in ENCODERS)
        return found if all(path for _, path in found) else None

    def find_weights(self, label: str) -> Weights:
        """Return the weights with this label. Raises `RunError` if the run has none."""
        known = {weights.label: weights for weights in self.weights()}
        return pick(known, label, "This run has no such weights; choose weights from the list.")

    def best_weights(self) -> str:
        """Return the label of the default weights: merged ResLoRA, else other merged weights, else the last weights."""
        labels = [weights.label for weights in self.weights()]
        wanted = ("ResLoRA: merged weights", *(label for label in labels if label.endswith(": merged weights")))
        return next((label for label in wanted if label in labels), labels[-1])


@cached_by_stamp(256)
def object_in(path: Path) -> dict:
    """Return the JSON object in a file; empty if the file is damaged. Callers must not change it."""
    return read_object(path)


@cached_by_stamp(64)
def rows_of(path: Path) -> tuple[dict, ...]:
    """Return the rows of a log with valid step and loss."""
    rows = read_log(path)
    return tuple(row for row in rows if 0 <= row["step"] <= MOST_STEPS and number(row.get("loss")) is not None)
