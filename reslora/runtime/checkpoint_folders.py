"""Find, rename and remove checkpoints when a run resumes; shared by all trainers."""

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import InvalidArgument, RunFailed, first_line, out_of_memory
from ..io import CHECKSUMS_NAME, remove, replacing, temporary_beside

STATE, RECORD = "trainer.pt", "trainer.json"
"""Files of a checkpoint: the state of optimizer, schedule and random generators, and the trainer's record."""
MERGED = "merged-by-[a-z]+"
"""Regular expression for the names, without `-<step>`, of checkpoints that the application has merged."""

EXPORTS = "exports.json"
"""File that says which files a finished method has exported."""
EXPORTED = "exported_step"
"""Key in that file of a run of an experiment: the step of the exported checkpoint."""
ADAPTERS = "adapters"
"""Subdirectory of an experiment's run for its saved adapters, one per evaluation; training cannot resume from them."""


def adapter_folder(folder: Path, step: int) -> Path:
    """Return the directory in which a run of an experiment saves its adapter after training step `step`."""
    return folder / ADAPTERS / f"step-{step:06d}"


def numbered(folder: Path, kind: str = "checkpoint") -> list[Path]:
    """Return the paths in `folder` with names `<kind>-<step>`, newest first; `kind` is a regular expression."""
    found = (path for path in folder.glob("*-*") if re.fullmatch(rf"{kind}-\d+", path.name))
    return sorted(found, key=step_of, reverse=True)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints of one method, newest first; some of their files may be missing."""
    files = (RECORD, STATE, CHECKSUMS_NAME)  # a directory without any of these is not a checkpoint
    return [path for path in numbered(folder) if any((path / name).is_file() for name in files)]


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint, which may be a merged one."""
    return int(checkpoint.name.rpartition("-")[2])


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint, or another file at its path, to `set-aside-<name>`, print it, and return the new path.

    The checkpoint is not removed, and no longer counts as a checkpoint.
    """
    number, there = 1, checkpoint.with_name(f"set-aside-{checkpoint.name}")
    while there.exists():
        number += 1
        there = checkpoint.with_name(f"set-aside-{checkpoint.name}-{number}")
    checkpoint.rename(there)
    print(f"{checkpoint} is not part of this training: renamed to {there.name}", flush=True)
    return there


def discard(old: Path) -> None:
    """Remove a file or directory that is no longer needed; if that fails, print a line and continue.

    The path is renamed first, so that a killed process does not leave an incomplete checkpoint under the old name.
    """
    there = old
    try:
        there = old.rename(temporary_beside(old))
        remove(there)
    except OSError as error:
        name = "" if there == old else f" (it was {old.name})"
        print(f"{there}{name} is no longer needed, but cannot be removed: {first_line(error)}", flush=True)


def set_others_aside(chosen: Path, found: Iterable[Path], place: Path, beside: Iterable[str] = ()) -> None:
    """Rename the checkpoints that do not belong to the training history of `chosen`, from which training resumes.

    Afterwards all checkpoints belong to one training history, so that a limit on their number removes the oldest ones.
    `found`: the run's checkpoints (`checkpoint-<step>`) and merged weights. `place`: the path in the run's directory
    for a checkpoint of the same step as `chosen`. There are two cases:

    - `chosen` is `place`: checkpoints of later steps are renamed.
    - `chosen` is elsewhere or has another name: all paths in `found`, and the files named in `beside`, are renamed.
      `chosen` is copied to `place`, so that the newest checkpoint belongs to its history even if the process is killed
      before the next checkpoint.
    """
    if chosen.resolve() == place.resolve():
        for other in found:
            if step_of(other) > step_of(place):
                set_aside(other)
        return
    with replacing(place) as temporary:
        shutil.copytree(chosen, temporary)  # may fail, so it precedes all other changes
        for other in dict.fromkeys([*found, place, *(place.with_name(name) for name in beside)]):
            if other.exists():
                set_aside(other)


@contextlib.contextmanager
def memory_reported(folder: Path) -> Iterator[None]:
    """Convert an out-of-memory error inside this context into a `RunFailed` that names the newest checkpoint."""
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        if (cause := out_of_memory(error)) is None:
            raise
        there = f"{folder} has no checkpoint yet: start again"
        if newest := next(iter(numbered(folder)), None):
            there = f"the newest checkpoint is {newest}: resume with --resume_from_checkpoint latest"
        problem = f"memory ran out ({first_line(cause)}), and nothing on disk is lost"
        raise RunFailed(f"{problem}; {there} once memory is free, or with a smaller batch") from error


def refuse_afresh(output: Path, folder: Path, finished: bool) -> None:
    """Raise `InvalidArgument` if training from the first step in `folder` would overwrite results of earlier training.

    Call this only if `folder` has no checkpoint to resume from. `folder` is --output_dir or a directory in it.
    """
    flag, fix = f"--output_dir {output}", f"choose another folder, or remove {folder} to start again"
    if aside := sorted(folder.glob("set-aside-checkpoint-*"), key=lambda path: path.stat().st_mtime):
        problem = f"{folder} has no checkpoint other than {', '.join(path.name for path in aside)}"
        raise InvalidArgument(flag, problem, f"resume with --resume_from_checkpoint {aside[-1]}, {fix}")
    if finished:
        raise InvalidArgument(flag, f"{folder} has been trained, but the checkpoint to resume from is missing", fix)
