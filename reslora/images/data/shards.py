"""Choose the training files and the training split of a dataset in several files, and check .tar archives."""

import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from ...errors import InvalidArgument
from ...formatting import is_or_are

PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt")
TEXTS = (".txt", ".text", ".transcript")  # `datasets` decodes these, in upper case too


def training_files(files: Sequence[Path], folder: Path, notes: list[str]) -> Sequence[Path]:
    """Return the files with "train" in their name or their folder's name; all files if none has it."""
    chosen = [path for path in files if "train" in str(path.relative_to(folder)).lower()] or files
    if len(chosen) < len(files):
        others = len(files) - len(chosen)
        notes.append(f"{others} of {len(files)} files {is_or_are(others)} not of the training split")
    return chosen


def training_split(splits: Mapping[str, datasets.Dataset], notes: list[str]) -> datasets.Dataset:
    """Return the split named "train", or the first if there is none."""
    name = "train" if "train" in splits else next(iter(splits))
    if others := [other for other in splits if other != name]:
        notes.append(f"the split {name} is trained on, not {', '.join(others)}")
    return splits[name]


def check_archives(files: Sequence[Path], argument: str, notes: list[str]) -> None:
    """Raise `InvalidArgument` for .tar files that contain pickles, or text that is not UTF-8.

    `datasets` may load the pickles, and its errors do not name the file. A line about each truncated file is added to
    `notes`.
    """
    for path in files:
        with tarfile.open(path) as archive:
            names, whole = archive.getnames(), _is_whole(archive)
            unreadable = next((entry.name for entry in archive if _is_other_text(archive, entry)), None)
        if pickled := [name for name in names if name.lower().endswith(PICKLES)]:
            problem = f"{path.name} holds {pickled[0]}, which is pickle"
            raise InvalidArgument(argument, problem, "leave it out: only images and captions are read")
        if unreadable:
            problem = f"{path.name} holds {unreadable}, which is not UTF-8"
            raise InvalidArgument(argument, problem, "save its captions as UTF-8")
        if not whole:
            notes.append(f"{path.name} has no end after {names[-1]}: is it cut off, or damaged there?")


def _is_other_text(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bool:
    """Return whether an entry is a text that is not UTF-8, the only encoding that `datasets` reads."""
    if not entry.name.lower().endswith(TEXTS) or (file := archive.extractfile(entry)) is None:
        return False
    try:
        file.read().decode()
    except UnicodeDecodeError:
        return True
    return False


def _is_whole(archive: tarfile.TarFile) -> bool:
    """Return whether an archive ends with an empty block, which tarfile does not check.

    The archive must have been read to its end.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
