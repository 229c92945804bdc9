"""Find the files to compare, and name them."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import InvalidArgument
from ...formatting import pluralize


class Entry(NamedTuple):
    """One item of the comparison: a file, or a group with a file for each seed."""

    name: str
    files: tuple[Path, ...]


def entries_of(words: Sequence[str]) -> list[Entry]:
    """Return an entry for each file; each of the words is a path or a glob pattern."""
    files = list(dict.fromkeys(path for word in words for path in found(word, "FILE")))
    if not files:
        raise InvalidArgument("FILE", "missing", "give LoRA files to compare, or --group")
    return [Entry(name, (path,)) for name, path in zip(names_of(files), files, strict=True)]


def groups_of(words: Sequence[str]) -> list[Entry]:
    """Return an entry for each group, from words such as `lora=lora-*.safetensors`."""
    groups: dict[str, list[Path]] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not (name and equals and pattern):
            raise InvalidArgument(f"--group {word}", "is not NAME=FILE", "write it as in lora='lora-*.safetensors'")
        if name == "base":
            raise InvalidArgument(f"--group {word}", "base is the name of the base model", "give another name")
        groups.setdefault(name, []).extend(found(pattern, f"--group {name}="))
    entries = [Entry(name, tuple(dict.fromkeys(files))) for name, files in groups.items()]
    for entry in entries:
        counts = f"has {pluralize(len(entry.files), 'file')}"
        if len(entry.files) < 2:
            fix = "give a file for each of two or more seeds, or compare files without --group"
            raise InvalidArgument(f"--group {entry.name}", counts, fix)
        if len(entry.files) != len(entries[0].files):
            counts += f", and {entries[0].name} has {len(entries[0].files)}"
            raise InvalidArgument(f"--group {entry.name}", counts, "give all groups the same number of files")
    return entries


def found(word: str, flag: str) -> list[Path]:
    """Return the paths that a path or a glob pattern matches, in natural order; raises `InvalidArgument` if none does.

    `flag`: the option of the word, for the message.
    """
    path = Path(word).expanduser()
    if path.exists() and word:
        return [path]
    every = glob.glob(str(path)) if word else []  # noqa: PTH207 - Path.glob rejects absolute patterns
    matches = sorted(map(Path, every), key=natural)
    if not matches:
        problem = "no file has such a name" if glob.has_magic(word) else "no such file or folder"
        raise InvalidArgument(f"{flag} {word}".replace("= ", "="), problem, "check the name")
    return matches


def natural(path: Path) -> list[tuple[bool, int, str]]:
    """Return a key that sorts epoch-2 before epoch-10."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def names_of(files: Sequence[Path]) -> list[str]:
    """Return a short name of each file: the file name, and the parent folders that make all names different."""
    whole = [file.absolute().with_suffix("") if file.suffix == ".safetensors" else file.absolute() for file in files]
    for length in range(1, max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names) and "base" not in names:
            return names
    return list(map(str, files))
