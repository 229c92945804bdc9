"""Store encoded items on disk, in Arrow files that several processes and runs write and share.

An item has one or several variants. Each variant is a safetensors blob in a record batch of its own, with tensors of
any shapes and dtypes. The footer of a file has the offsets of the record batches, so each can be read separately. Files
are read, not memory-mapped, because mapped pages count as memory of the process.

The last record batch of a file is its index: each item's key and number of variants, and the reasons why items could
not be encoded. A key is a hash of everything that the item depends on.
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

from ...errors import RunFailed, first_line
from ...io import remove_leftovers, replacing
from ...runtime.processes import wait
from ..generators import derive

Item = Sequence[dict[str, torch.Tensor]] | str
"""The variants of an item, or the reason why the item could not be encoded."""

SCHEMA = pyarrow.schema({"content": pyarrow.large_binary()})
OPEN_FILES = 512  # file descriptors; systems allow at least 1024


class Encoded:
    """Items by number, found by their keys in the files of a folder, and read from disk on access.

    Files are named `<kind>-<hash of their keys>.arrow`. Items with equal keys are stored once.
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
        """Return a variant of an item; `variant` wraps around if the item has fewer variants."""
        entry = self.entry[number]
        return _opened(self.paths[self.file[entry]]).read(int(self.keys[entry]), variant)

    def problems(self) -> dict[int, str]:
        """Return the reasons why items could not be encoded, by the item's number."""
        keys = self.keys[self.entry].tolist()
        return {number: self.reasons[key] for number, key in enumerate(keys) if key in self.reasons}

    def missing(self) -> list[int]:
        """Return the numbers of the items that are in no file; of items with the same key, only the first number."""
        _, first = np.unique(self.entry, return_index=True)
        return np.sort(first[self.file < 0]).tolist()

    def look(self) -> None:
        """Read the index of each file that was written since the last call."""
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
        """Write items, whose numbers are `numbers`, to one file atomically, with one item in memory at a time."""
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
    """An open file and its index; another run may replace the file on disk at any time."""

    def __init__(self, path: Path) -> None:
        self.path, self.reader = path, pyarrow.ipc.open_file(pyarrow.OSFile(str(path)))
        index = json.loads(self._content(self.reader.num_record_batches - 1))
        keys, counts = (np.asarray(index[name], np.int64) for name in ("keys", "counts"))
        order = np.argsort(keys)
        self.keys, self.counts, self.rows = keys[order], counts[order], (np.cumsum(counts) - counts)[order]
        self.problems = dict(index["problems"])

    def read(self, key: int, variant: int) -> dict[str, torch.Tensor]:
        """Return a variant of the item with that key.

        Raises `OSError` if the file lacks the item or is damaged.
        """
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key or not self.counts[place]:
            raise OSError(f"{self.path} has changed since the run began")
        row = int(self.rows[place] + variant % self.counts[place])
        try:
            return safetensors.torch.load(self._content(row))
        except (safetensors.SafetensorError, pyarrow.ArrowInvalid) as error:
            fix = "remove it, and its content is encoded anew"
            raise OSError(f"{self.path} is damaged ({first_line(error)}): {fix}") from None

    def _content(self, row: int) -> bytes:
        return self.reader.get_batch(row).column(0)[0].as_py()


def fill(
    encoded: Encoded, part: int, make: Callable[[Sequence[int]], Generator[Item]], accelerator: Accelerator
) -> None:
    """Write this process's share of the missing items, at most `part` items to a file.

    Processes need not know whether their machines share the folder. There are three rounds, each for the items that are
    still missing. In the first round, all processes divide these items; in the second, the processes of each machine
    do. In the third, each process writes all that it does not find. Raises `RunFailed` if written files vanish.
    """
    if accelerator.is_local_main_process:
        remove_leftovers(encoded.folder)
    for round_ in range(len(_rounds(accelerator))):
        encoded.look()
        numbered = share(encoded, part, accelerator, round_)
        wait()  # a process that already sees another's new file would compute other shares
        for numbers in numbered:
            with contextlib.closing(make(numbers)) as items:
                encoded.write(numbers, items)
        wait()
    encoded.look()
    if encoded.missing():
        raise RunFailed(f"{encoded.folder}: files written there have disappeared; start the run again")


def share(encoded: Encoded, part: int, accelerator: Accelerator, round_: int = 0) -> list[list[int]]:
    """Return the numbers of the items that this process writes in a round, one list per file."""
    (first, distance), missing = _rounds(accelerator)[round_], encoded.missing()
    parts = [missing[start : start + part] for start in range(0, len(missing), part)]
    return parts[first::distance]


def _rounds(accelerator: Accelerator) -> list[tuple[int, int]]:
    """Return, for each round, the first file of this process's share and the stride to the next."""
    of_all = (accelerator.process_index, accelerator.num_processes)
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return [of_all, (accelerator.local_process_index, of_machine), (0, 1)]


def _batch(content: bytes) -> pyarrow.RecordBatch:
    return pyarrow.record_batch([pyarrow.array([content], pyarrow.large_binary())], schema=SCHEMA)


_opened = functools.lru_cache(OPEN_FILES)(File)


def _whole(path: Path) -> File | None:
    """Return the opened file, or None if it is missing or truncated."""
    try:
        return File(path)
    except (OSError, pyarrow.ArrowInvalid, ValueError):
        return None
