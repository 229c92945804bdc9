"""Encoded items, many more than memory holds, in Arrow files that several processes and runs write and share.

An item is one or several safetensors files, which keep any shape and dtype, each a record batch of its own. A file's
footer finds it: opening a file reads nothing but that, and a batch is read without its neighbours. It is read and not
mapped, for mapped pages count as memory of the process. The last batch of a file says which items it holds, by keys
that stand for all that they depend on, and which of them could not be encoded, and why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import safetensors.torch
import torch
from accelerate import Accelerator

from ...common.errors import RunFailed, first_line
from ...common.together import wait
from ...files import remove_leftovers, replacing
from ..seeds import derive

Item = Sequence[dict[str, torch.Tensor]] | str
"""What is written: the variants of an item, or why there are none."""

SCHEMA = pyarrow.schema({"content": pyarrow.large_binary()})
OPEN_FILES = 512  # as many stay open; systems allow 1024 and more


class Encoded:
    """Items by number, found by their keys in the files of a folder; each is read from disk when it is asked for.

    The files are `<kind>-<hash of the keys in them>.arrow`. Items of one key are one.
    """

    def __init__(self, folder: Path, kind: str, keys: Sequence[int]) -> None:
        self.folder, self.kind = folder, kind
        self.keys, self.entry = np.unique(np.asarray(keys, np.int64), return_inverse=True)
        self.file = np.full(len(self.keys), -1, np.int32)
        self.paths: list[Path] = []
        self.reasons: dict[int, str] = {}
        self.known: set[str] = set()
        self.look()

    def read(self, number: int, variant: int = 0) -> dict[str, torch.Tensor]:
        """A variant of an item; of one that has fewer, the one that this would be if they were repeated."""
        entry = self.entry[number]
        return _opened(self.paths[self.file[entry]]).read(int(self.keys[entry]), variant)

    def problems(self) -> dict[int, str]:
        """Which items could not be encoded, and why."""
        keys = self.keys[self.entry].tolist() if self.reasons else []
        return {number: self.reasons[key] for number, key in enumerate(keys) if key in self.reasons}

    def missing(self) -> list[int]:
        """Numbers of the items that are in no file, each key once."""
        _, first = np.unique(self.entry, return_index=True)
        return np.sort(first[self.file < 0]).tolist()

    def look(self) -> None:
        """Finds the items in files that were written since."""
        for path in sorted(self.folder.glob(f"{self.kind}-*.arrow")):
            if (self.file >= 0).all():
                return
            if path.name not in self.known and (file := _whole(path)) is not None:
                self.known.add(path.name)
                self._take(path, file)

    def _take(self, path: Path, file: File) -> None:
        entries = np.searchsorted(self.keys, file.keys).clip(max=len(self.keys) - 1)
        wanted = (self.keys[entries] == file.keys) & (self.file[entries] < 0)
        if wanted.any():
            self.file[entries[wanted]] = len(self.paths)
            self.paths.append(path)
            chosen = set(file.keys[wanted].tolist())
            self.reasons |= {key: reason for key, reason in file.problems.items() if key in chosen}

    def write(self, numbers: Sequence[int], items: Iterable[Item]) -> None:
        """Writes a file of these items, whole or not at all, holding one in memory at a time."""
        keys = [int(self.keys[self.entry[number]]) for number in numbers]
        counts, problems = [], []
        with (
            replacing(self.folder / f"{self.kind}-{derive(*sorted(keys)):016x}.arrow") as temporary,
            pyarrow.OSFile(str(temporary), "wb") as file,
            pyarrow.ipc.new_file(file, SCHEMA) as writer,
        ):
            for key, item in zip(keys, items, strict=True):
                if isinstance(item, str):
                    problems.append((key, item))
                    item = ()
                for tensors in item:
                    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
                    writer.write_batch(_batch(safetensors.torch.save(tensors)))
                counts.append(len(item))
            index = {"keys": keys, "counts": counts, "problems": problems}
            writer.write_batch(_batch(json.dumps(index).encode()))


class File:
    """A file, opened, with the rows of its items: another run may put one with other rows into its place any time."""

    def __init__(self, path: Path) -> None:
        self.path, self.reader = path, pyarrow.ipc.open_file(pyarrow.OSFile(str(path)))
        index = json.loads(self._content(self.reader.num_record_batches - 1))
        keys, counts = (np.asarray(index[name], np.int64) for name in ("keys", "counts"))
        order = np.argsort(keys)
        self.keys, self.counts, self.rows = keys[order], counts[order], (np.cumsum(counts) - counts)[order]
        self.problems = dict(index["problems"])

    def read(self, key: int, variant: int) -> dict[str, torch.Tensor]:
        """A variant of the item of that key."""
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key or not self.counts[place]:
            raise OSError(f"{self.path} is not the file that it was when the run began")
        row = int(self.rows[place] + variant % self.counts[place])
        try:
            return safetensors.torch.load(self._content(row))
        except (safetensors.SafetensorError, pyarrow.ArrowInvalid) as error:
            fix = "remove it, and what it holds is encoded anew"
            raise OSError(f"{self.path} is damaged ({first_line(error)}): {fix}") from None

    def _content(self, row: int) -> bytes:
        return self.reader.get_batch(row).column(0)[0].as_py()


def fill(
    encoded: Encoded, part: int, make: Callable[[Sequence[int]], Generator[Item]], accelerator: Accelerator
) -> None:
    """Each process writes its share of the items that are missing, at most `part` to a file.

    Whether machines share the folder is seen, not asked: after the first round each machine's processes write what
    they still miss, and after the second each process for itself.
    """
    if accelerator.is_local_main_process:
        remove_leftovers(encoded.folder)
    for round_ in range(len(_rounds(accelerator))):
        encoded.look()
        numbered = share(encoded, part, accelerator, round_)
        wait()  # until all have looked: who sees a file that another has written since would share differently
        for numbers in numbered:
            with contextlib.closing(make(numbers)) as items:
                encoded.write(numbers, items)
        wait()
    encoded.look()
    if encoded.missing():
        raise RunFailed(f"{encoded.folder}: what was written there is gone again; start the run once more")


def share(encoded: Encoded, part: int, accelerator: Accelerator, round_: int = 0) -> list[list[int]]:
    """The items that this process writes in a round, file by file."""
    (first, distance), missing = _rounds(accelerator)[round_], encoded.missing()
    parts = [missing[start : start + part] for start in range(0, len(missing), part)]
    return parts[first::distance]


def _rounds(accelerator: Accelerator) -> list[tuple[int, int]]:
    """The first file and the distance to the next of this process's share, round by round."""
    of_all = (accelerator.process_index, accelerator.num_processes)
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return [of_all, (accelerator.local_process_index, of_machine), (0, 1)]


def _batch(content: bytes) -> pyarrow.RecordBatch:
    return pyarrow.record_batch([pyarrow.array([content], pyarrow.large_binary())], schema=SCHEMA)


_opened = functools.lru_cache(OPEN_FILES)(File)


def _whole(path: Path) -> File | None:
    """The file, or None for one that is missing, or was cut short when the machine went down."""
    try:
        return File(path)
    except (OSError, pyarrow.ArrowInvalid, ValueError):
        return None
