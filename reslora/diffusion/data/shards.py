"""The files of a webdataset or of JSON tables: which of them are trained on, and what must not be in them."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

from ...common.errors import InvalidArgument

PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt")


def training_files(files: Sequence[Path], folder: Path, notes: list[str]) -> Sequence[Path]:
    """Those that have "train" in their names or folders' names, where some do."""
    chosen = [path for path in files if "train" in str(path.relative_to(folder)).lower()] or files
    if len(chosen) < len(files):
        notes.append(f"{len(files) - len(chosen)} of {len(files)} files are not of the training split")
    return chosen


def refuse_pickles(files: Sequence[Path], argument: str) -> None:
    """Refuses .tar files with pickle in them, some of which `datasets` would unpickle, if carefully."""
    for path in files:
        with tarfile.open(path) as archive:
            name = next((member.name for member in archive if member.name.lower().endswith(PICKLES)), None)
        if name is not None:
            problem = f"{path.name} holds {name}, which is pickle"
            raise InvalidArgument(argument, problem, "leave it out: images and captions alone are read")
