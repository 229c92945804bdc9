"""Runs lined up: one at a time, or one on each GPU; those that wait outlive a restart of the application.

All that is known is in a file of the runs folder, and each change of it is made under a lock: threads, and several
applications on one folder, agree on what comes next.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from reslora.files import write_json

from .folders import BUNDLED, UPLOADS
from .launcher import Busy, Trainings
from .library import REPORT, Experiment
from .runs import LARGEST_JSON, Run, RunError
from .uploads import keep

FILE, LOCK = "queue.json", ".queue.lock"
VERSION = 1
KINDS: dict[str, type[Run]] = {"run": Run, "experiment": Experiment}
WAITING, RUNNING, FAILED = "waiting", "running", "failed"
STATES = (WAITING, RUNNING, FAILED, "finished", "stopped")
EVERY, FRESH = 2.0, 1.0
"""Seconds between two looks at the queue, and for which it is known whether what is added would wait."""
MOST, MOST_ENDED = 100, 20
LONGEST = 100_000  # characters of one entry in the file
GONE = "its folder is gone: it was renamed or removed"
PATIENCE = 120.0  # seconds for another change to be done, which may copy a thousand images


@dataclass
class Entry:
    """A run or an experiment in the queue: what was chosen in the form, by which its command is made when it starts."""

    name: str
    kind: str = "run"
    settings: dict = field(default_factory=dict)
    folder: str | None = None
    """Of the images, by its name on the list; None means the bundled ones, or those of what goes on."""
    resume: bool = False
    """It goes on from its newest checkpoint, with the settings it has."""
    state: str = WAITING
    line: str = ""
    """Why it failed, or what its trainer said last."""
    device: str | None = None
    """The GPU that it was given, where there are several."""

    @property
    def ends(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in (WAITING, RUNNING)

    @classmethod
    def read(cls, content: object) -> Entry:
        """An entry of the file; `ValueError` if it is none."""
        if not isinstance(content, dict) or set(content) != {one.name for one in fields(cls)}:
            raise ValueError("an entry has other fields")
        entry = cls(**content)
        kinds = {"name": str, "settings": dict, "folder": str | None, "resume": bool, "line": str, "device": str | None}
        if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(entry, name), kind)]:
            raise ValueError(f"the {wrong[0]} of an entry is of another kind")
        if entry.kind not in KINDS or entry.state not in STATES or not is_folder_name(entry.name):
            raise ValueError("the name, kind or state of an entry is none that there is")
        return entry


def is_folder_name(name: str) -> bool:
    """Whether a name can be that of a folder of runs that is seen, and of nothing above it."""
    return Path(name).name == name and not name.startswith(".") and "\0" not in name and bool(name)


class Queue:
    """The queue of a folder of runs."""

    def __init__(self, trainings: Trainings) -> None:
        self.trainings = trainings
        self.path = trainings.library.folder / FILE
        self.closed = threading.Event()
        self.busy, self.looked = False, -math.inf

    # -- its file ------------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All of it in order; `RunError` where its file cannot be read, which then stays as it is."""
        try:
            if not self.path.is_file():
                return []
            if self.path.stat().st_size > LARGEST_JSON:
                raise ValueError("it is too large")
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("version") != VERSION:
                raise ValueError("it was written by another version")
            return [Entry.read(one) for one in content["entries"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)[:100]
            raise RunError(
                f"The queue cannot be read ({why}): mend or remove {FILE} in the folder of runs. It was left as it is."
            ) from None

    @contextlib.contextmanager
    def changing(self) -> Iterator[list[Entry]]:
        """Its entries as they are now, to be changed; they are written afterwards, unless something is raised."""
        try:
            with writable():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(self.path.with_name(LOCK), timeout=PATIENCE).acquire()
        except Timeout:
            raise RunError("The queue is being changed by somebody else for long; try again.") from None
        with lock:
            self.looked = -math.inf
            entries = self.entries()
            before = [asdict(entry) for entry in entries]
            for entry in entries:  # what has just ended may be resumed, or removed
                self.look_after(entry)
            yield entries
            after = [asdict(entry) for entry in without_old(entries)]
            if after != before:
                with writable():
                    write_json(self.path, {"version": VERSION, "entries": after})

    # -- what people do with it ----------------------------------------------------------------------------------------

    def add(self, entry: Entry, uploads: Sequence[str] = (), caption: str = "") -> Entry:
        """Lines up what may start, and starts what is next; returns the entry as it is then.

        Raises `RunError` for what the trainer or the launcher would refuse. Uploaded images are stored.
        """
        if self.trainings.library.is_single and entry.resume:  # the folder is the run's own: there is no queue
            self.trainings.resume(entry.name, KINDS[entry.kind])
            entry.state = RUNNING
            return entry
        self.check(entry, uploads, caption)
        with self.changing() as entries:
            self.check(entry, uploads, caption)
            live = [one for one in entries if not one.ends]
            if entry.name in (one.name for one in live):
                raise RunError(f"{entry.name} is in the queue already; choose another name, or remove that one.")
            if len(live) >= MOST:
                raise RunError(f"At most {MOST} runs can be lined up.")
            is_new = not (entry.resume or self.goes_on(entry))
            if is_new and uploads:
                kept = keep(self.trainings.library.folder / UPLOADS / entry.name, uploads, caption)
                entry.folder = f"runs/{kept.name}"
            elif is_new:
                entry.folder = entry.folder or BUNDLED  # so that whoever looks at the queue is told
            entries[:] = [one for one in entries if one.name != entry.name] + [entry]
        self.advance()
        added = next((one for one in self.entries() if one.name == entry.name), entry)
        if added.state == FAILED:
            raise RunError(added.line)
        return added

    def check(self, entry: Entry, uploads: Sequence[str] = (), caption: str = "") -> None:
        """`RunError` for what could not start even if nothing else trained."""
        try:
            written = json.dumps(asdict(entry), ensure_ascii=False).encode()
            Entry.read(json.loads(written))
        except (TypeError, ValueError, RecursionError):
            raise RunError("The settings have something that cannot be written down.") from None
        if len(written) > LONGEST:
            raise RunError("These settings are too long to be lined up.")
        self.command(entry, uploads, caption)
        run = self.run_of(entry)
        if self.trainings.is_active(run):
            raise RunError(f"{run.name} is training; wait for it, or stop it first.")

    def move(self, name: str, by: int) -> None:
        """Up (-1) or down (1) among those that wait."""
        with self.changing() as entries:
            places = [place for place, entry in enumerate(entries) if entry.state == WAITING]
            here = next((number for number, place in enumerate(places) if entries[place].name == name), None)
            if here is None:
                raise RunError("Nothing of that name waits in the queue.")
            there = here + (1 if by > 0 else -1)
            if 0 <= there < len(places):
                first, second = places[here], places[there]
                entries[first], entries[second] = entries[second], entries[first]

    def remove(self, name: str) -> None:
        """Takes out what waits or has ended; what trains is stopped instead."""
        with self.changing() as entries:
            found = next((entry for entry in entries if entry.name == name), None)
            if found is None:
                raise RunError("There is nothing of that name in the queue.")
            if found.state == RUNNING:
                raise RunError(f"{name} is training; stop it instead.")
            entries.remove(found)

    def stop(self, name: str) -> str:
        """Stops what trains, says so; what has ended meanwhile is not taken for what has begun after it."""
        entry = next((entry for entry in self.entries() if entry.name == name), None)
        if entry is None:
            raise RunError("There is nothing of that name in the queue.")
        if entry.state == RUNNING and not self.run_of(entry).folder.is_dir():
            raise RunError(f"{name}: {GONE}. Put it back, and stop it then: else it ends before its next checkpoint.")
        return self.trainings.stop(name, KINDS[entry.kind], only=True)

    def clear(self) -> None:
        """Takes out what has ended."""
        ended = {entry.name for entry in self.entries() if entry.ends}  # what ends just now has not been seen
        with self.changing() as entries:
            entries[:] = [entry for entry in entries if not (entry.ends and entry.name in ended)]

    # -- what it does by itself ----------------------------------------------------------------------------------------

    def would_wait(self) -> bool:
        """Whether what is added now does not start at once, as it was a moment ago: every open page asks."""
        if time.monotonic() - self.looked > FRESH:
            try:
                entries = self.entries()
                self.busy = any(entry.state == WAITING for entry in entries) or not self.free(entries)
            except RunError:
                self.busy = True  # it cannot be read
            self.looked = time.monotonic()
        return self.busy

    def advance(self) -> None:
        """Notes what has ended, and starts what may; one that fails does not keep the next from starting."""
        if all(entry.ends for entry in self.entries()):
            return
        with self.changing() as entries:
            for entry in entries:
                if entry.state == WAITING:
                    if not (free := self.free(entries)):
                        break
                    self.begin(entry, free[0])

    def look_after(self, entry: Entry) -> None:
        """Notes whether an entry's trainer is at work, or what came of it."""
        run = self.run_of(entry)
        if entry.ends:
            return
        if self.trainings.is_active(run):
            entry.state = RUNNING  # also where the application ended before it could be noted
        elif entry.state == RUNNING:
            entry.state = run.status
            line = self.trainings.last_line(run) if run.folder.is_dir() else GONE
            if isinstance(run, Experiment) and line.endswith(REPORT):  # what it prints where it ended as it should
                line = run.time_is_over or line
            entry.line = "" if entry.state == "finished" else line

    def begin(self, entry: Entry, device: str | None) -> None:
        """Starts an entry, checked as it is now, or notes why it cannot be."""
        kind = KINDS[entry.kind]
        try:
            # Noted when it has started: whatever ends this process in between, a trainer at work is found by its log.
            if entry.resume:
                self.trainings.resume(entry.name, kind, device)
            else:
                self.trainings.start(entry.name, self.command(entry), kind, device)
            entry.state, entry.device, entry.line = RUNNING, device, ""
        except Busy:
            pass  # somebody has started one meanwhile
        except RunError as error:
            entry.state, entry.line = FAILED, str(error)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            entry.state, entry.line = FAILED, "It could not be started; the terminal says more."

    def command(self, entry: Entry, uploads: Sequence[str] = (), caption: str = "") -> list[str]:
        """The words of its command, with every check that the launcher has; of a resumed one there are none."""
        kind = KINDS[entry.kind]
        if entry.resume:
            self.trainings.resumable(entry.name, kind)
            return []
        images = self.trainings.choose_images(entry.name, entry.folder, uploads, caption, kind)
        return self.trainings.command(entry.name, entry.settings, images, kind)

    def goes_on(self, entry: Entry) -> bool:
        """Whether it adds to an experiment that is there."""
        return self.trainings.goes_on(entry.name, KINDS[entry.kind])

    def run_of(self, entry: Entry) -> Run:
        """The run or experiment that an entry becomes."""
        return KINDS[entry.kind](entry.name, self.trainings.library.folder / entry.name)

    def free(self, entries: Sequence[Entry]) -> list[str | None]:
        """What a training can have now; what trains on nobody knows which GPU takes them all."""
        given = {entry.name: entry.device for entry in entries if entry.state == RUNNING}
        taken = {given.get(run.name) for run in self.trainings.all_active()}
        return [] if None in taken else [device for device in devices() if device not in taken]

    def keep_going(self) -> None:
        """Starts the thread that looks again and again, until `closed` is set; says how many wait already."""
        with contextlib.suppress(RunError):
            if waiting := sum(entry.state == WAITING for entry in self.entries()):
                print(f"python -m app: {waiting} in the queue, which start by themselves", file=sys.stderr)
        threading.Thread(target=self._look_again, daemon=True).start()

    def _look_again(self) -> None:
        told = ""
        while True:
            problem = ""
            try:
                self.advance()
            except RunError as error:
                problem = str(error)
            except Exception as error:
                problem = f"The queue stands still: {error!r}"
            if problem not in ("", told):  # once
                print(f"python -m app: {problem}", file=sys.stderr)
            told = problem
            if self.closed.wait(EVERY):
                return


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """What the file system refuses, in words for the page."""
    try:
        yield
    except Timeout:  # an OSError, too
        raise
    except OSError as error:
        raise RunError(f"The queue cannot be written ({error.strerror}); nothing has been changed.") from None


def without_old(entries: Sequence[Entry]) -> list[Entry]:
    """The entries but for what ended long ago."""
    old = [entry for entry in entries if entry.ends][:-MOST_ENDED]
    return [entry for entry in entries if not any(entry is one for one in old)]


def devices() -> list[str | None]:
    """What each training gets for itself: a GPU where there are several, else None, which is all that there is."""
    count = torch.cuda.device_count()
    if count < 2:
        return [None]
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in names.split(",")][:count]
