"""What every trainer does with checkpoints that it goes on from, and with those that are none of its own."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..files import remove, replacing, temporary_beside
from .errors import InvalidArgument, RunFailed, first_line, out_of_memory

MERGED = "merged-by-[a-z]+"
"""How what the application merges a checkpoint into is called, before the step."""


def numbered(folder: Path, kind: str = "checkpoint") -> list[Path]:
    """Everything in a folder that is called `<kind>-<step>`, newest first. `kind`: a regular expression."""
    found = (path for path in folder.glob("*-*") if re.fullmatch(rf"{kind}-\d+", path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint, or of what it was merged into."""
    return int(checkpoint.name.rpartition("-")[2])


def set_aside(checkpoint: Path, why: str = "is not of this line of training", mark: str = "set-aside") -> Path:
    """Give a checkpoint, or what is in its place, another name, and return that: what is not ours is not removed.

    A name that transformers does not take for a checkpoint's: it removes the older ones of these.
    """
    number, there = 1, checkpoint.with_name(f"{mark}-{checkpoint.name}")
    while there.exists():
        number += 1
        there = checkpoint.with_name(f"{mark}-{checkpoint.name}-{number}")
    checkpoint.rename(there)
    print(f"{checkpoint} {why}: it is {there.name} now", flush=True)
    return there


def discard(old: Path) -> None:
    """Remove what newer ones have replaced; training goes on where that cannot be done, and a line says so.

    Under another name first: a kill half-way must not leave half a checkpoint.
    """
    there = old
    try:
        there = old.rename(temporary_beside(old))
        remove(there)
    except OSError as error:
        name = "" if there == old else f" (it was {old.name})"
        print(f"{there}{name} cannot be removed, and nothing needs it: {first_line(error)}", flush=True)


def set_others_aside(chosen: Path, found: Iterable[Path], place: Path, beside: Iterable[str] = ()) -> None:
    """Set aside what training from `chosen` does not descend from: later checkpoints, or all where it is none of them.

    So those that a limit removes, and those whose places are taken, are always of one line. `found`: those called
    `checkpoint-<step>`, and what they were merged into; `place`: where the folder has the one of this step. `chosen`
    may have any name, in another folder or as one that was set aside itself: it is copied to `place` then, so that
    after a kill before the next checkpoint the newest one is of this line too. What the folder holds `beside`
    checkpoints, by name, is of another line then and steps aside with them.
    """
    if chosen.resolve() == place.resolve():
        for other in found:
            if step_of(other) > step_of(place):
                set_aside(other)
        return
    with replacing(place) as temporary:
        shutil.copytree(chosen, temporary)  # may fail: before anything else is changed
        for other in dict.fromkeys([*found, place, *(place.with_name(name) for name in beside)]):
            if other.exists():
                set_aside(other)


@contextlib.contextmanager
def memory_reported(folder: Path) -> Iterator[None]:
    """Turn memory that runs out while `folder` is trained into a `RunFailed` that names the newest checkpoint there."""
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        if (cause := out_of_memory(error)) is None:
            raise
        there = f"{folder} has no checkpoint yet: start again"
        if newest := next(iter(numbered(folder)), None):
            there = f"the newest checkpoint is {newest}: go on with --resume_from_checkpoint latest"
        problem = f"memory ran out ({first_line(cause)}), and nothing on disk is lost"
        raise RunFailed(f"{problem}; {there} once some is free, or with a smaller batch") from error


def refuse_afresh(output: Path, folder: Path, finished: bool) -> None:
    """Raise `InvalidArgument` where to start from zero in `folder` would overwrite what was trained there.

    For who finds no checkpoint to go on from. `folder` is a part of --output_dir, or all.
    """
    flag, fix = f"--output_dir {output}", f"choose another, or remove {folder} to start afresh"
    if aside := sorted(folder.glob("set-aside-checkpoint-*"), key=lambda path: path.stat().st_mtime):
        problem = f"{folder} has no checkpoint but {', '.join(path.name for path in aside)}"
        raise InvalidArgument(flag, problem, f"go on with --resume_from_checkpoint {aside[-1]}, {fix}")
    if finished:
        raise InvalidArgument(flag, f"{folder} was trained, and the checkpoint to go on from is gone", fix)


def cannot_be_loaded(checkpoint: Path | str, error: Exception) -> str:
    """Return the line for a checkpoint that is whole and cannot be loaded all the same."""
    problem = f"{checkpoint} is whole, but cannot be loaded ({first_line(error)})"
    return f"{problem}; nothing on disk was changed: the same command tries again"
