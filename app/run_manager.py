"""Write notes on runs and experiments, rename and delete them, and restore deleted ones.

A deleted run is moved to its own folder in `.trash` of the runs folder. Names from a browser are only compared with the
names of the listed folders, never used as paths.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from reslora.images.data.listing import TRASH
from reslora.io import replacing
from reslora.options.prompts import clean

from .folders import children, new_place
from .jobs import Jobs
from .runs import LONGEST_NOTES, NOTES, Run, RunError, pick, reporting


class RunManager:
    """Changes notes, renames, deletes and restores the runs and experiments of a runs folder."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.library = jobs, jobs.library

    def find(self, name: object) -> Run:
        """Return the run or experiment with this name. Raises `RunError` if the run or experiment is not in the runs
        folder.
        """
        found = self.library.find_any(name)
        if not self.library.owns(found):
            raise RunError(f"{found.name} cannot be changed, because it is not in the folder of runs.")
        return found

    def write_notes(self, name: str, was: str, notes: str) -> str:
        """Write the notes on a run, and return the notes as stored.

        Raises `RunError` if the stored notes are not `was`, the notes that the user saw.
        """
        if not isinstance(notes, str) or clean(notes) != notes or len(notes) > LONGEST_NOTES:
            raise RunError(f"Notes must be valid text of at most {LONGEST_NOTES:,} characters; nothing was saved.")
        notes = notes.replace("\r\n", "\n").strip()
        with self.jobs.lock:
            run = self.find(name)
            if len(run.notes) > LONGEST_NOTES:
                raise RunError(f"The notes of {run.name} are too long for the page: edit {NOTES} in its folder.")
            if run.notes != was:
                raise RunError(f"The notes of {run.name} were changed in the meantime, and nothing was saved.")
            with reporting("The notes cannot be saved"):
                with replacing(run.folder / NOTES) as temporary:
                    temporary.write_text(notes, encoding="utf-8", newline="\n")
                if not notes:
                    (run.folder / NOTES).unlink(missing_ok=True)
        return notes

    def throw_away(self, name: str) -> str:
        """Move a run to the trash, and return a sentence that reports it.

        Raises `RunError` if the run trains or waits."""
        with self.idle(name) as run:
            trash = self.library.folder / TRASH
            if trash.is_symlink():
                raise RunError(f"{TRASH} in the folder of runs is a link; remove the link first.")
            place = new_place(self.library.folder)
            with reporting(f"{run.name} cannot be moved"):
                place.mkdir(parents=True)
                run.folder.rename(place / run.name)
        return f"{run.name} is in the trash ({TRASH} in the folder of runs)."

    def rename(self, name: str, new: str) -> str:
        """Rename a run's folder, and return a sentence that reports it.

        Raises `RunError` for an invalid or existing name, and if the run is training or waits in the queue."""
        with self.idle(name) as run:
            target = self.jobs.new_folder(new)
            with reporting(f"{run.name} cannot be renamed"):
                run.folder.rename(target)
        return f"{run.name} is now {target.name}."

    @contextlib.contextmanager
    def idle(self, name: object) -> Iterator[Run]:
        """Yield a run that cannot be started meanwhile. Raises `RunError` if the run trains or waits."""
        with self.jobs.changing() as entries:
            run = self.find(name)
            self.jobs.refuse_active(run)
            if any(entry.name == run.name and not entry.ends for entry in entries):
                raise RunError(f"{run.name} waits in the queue; remove it there first.")
            yield run

    def trashed(self) -> dict[str, Path]:
        """Return the folders of the runs in the trash, newest first; the keys are the names of their parent folders."""
        trash = self.library.folder / TRASH
        places = [] if trash.is_symlink() else reversed(children(trash))
        found = {place.name: children(place) for place in places}
        return {name: inside[0] for name, inside in found.items() if len(inside) == 1}

    def restore(self, place: str) -> str:
        """Move a run from the trash back to the runs folder, and return a sentence that reports it.

        `place`: the key of the run in `trashed()`."""
        with self.jobs.changing() as entries:
            folder = pick(self.trashed(), place, "There is no such run in the trash; choose one from the list.")
            target = self.library.folder / folder.name
            if target.exists() or target.is_symlink():
                raise RunError(f"Another run named {folder.name} exists: delete that run first.")
            if any(entry.name == folder.name and not entry.ends for entry in entries):
                raise RunError(f"Another run named {folder.name} is in the queue: remove it from the queue first.")
            with reporting(f"{folder.name} cannot be restored"):
                folder.rename(target)
                folder.parent.rmdir()
        return f"{folder.name} is restored."
