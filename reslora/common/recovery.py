"""What every trainer does with checkpoints that it goes on from, and with those that are none of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import InvalidArgument, first_line


def numbered(folder: Path) -> list[Path]:
    """Everything in a folder that is called `checkpoint-<step>`, newest first."""
    found = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def set_aside(checkpoint: Path) -> Path:
    """Gives what is in the place of a checkpoint another name, and returns that: what is not ours is not removed.

    A name that transformers does not take for a checkpoint's: it removes the older ones of these.
    """
    number, there = 1, checkpoint.with_name(f"set-aside-{checkpoint.name}")
    while there.exists():
        number += 1
        there = checkpoint.with_name(f"set-aside-{checkpoint.name}-{number}")
    checkpoint.rename(there)
    print(f"{checkpoint} is not of this line of training: it is {there.name} now", flush=True)
    return there


def set_others_aside(chosen: Path, found: Iterable[Path]) -> None:
    """Sets aside what training from `chosen` does not descend from: later checkpoints, or all where it is none of them.

    So those that a limit removes, and those whose places are taken, are always of one line. `found`: those called
    `checkpoint-<step>`; `chosen` may have any name, in another folder or as one that was set aside itself.
    """
    found = list(found)
    step = max((step_of(other) for other in found if other.resolve() == chosen.resolve()), default=-1)
    for other in found:
        if step_of(other) > step:
            set_aside(other)


def refuse_afresh(output: Path, folder: Path) -> None:
    """Raises `InvalidArgument`: what was trained in `folder`, a part of --output_dir or all, is not to be overwritten.

    For who would start from zero there, since no checkpoint to go on from is left.
    """
    problem = f"{folder} was trained, and the checkpoint to go on from is gone"
    raise InvalidArgument(f"--output_dir {output}", problem, f"choose another, or remove {folder} to start afresh")


def cannot_be_loaded(checkpoint: Path | str, error: Exception) -> str:
    """The line for a checkpoint that is whole and cannot be loaded all the same."""
    problem = f"{checkpoint} is whole, but cannot be loaded ({first_line(error)})"
    return f"{problem}; nothing on disk was changed: the same command tries again"
