"""Tensors by number, many more than memory holds, in Arrow files that several processes write and share.

A cell is a record batch of its own, which the file's footer finds: opening a file reads nothing but that, and a cell is
read without its neighbours. It is read and not mapped, for mapped pages count as memory of the process. A cell is a
safetensors file in itself, which keeps any shape and dtype. The last one of a file says which are empty, and why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import safetensors.torch
import torch
from accelerate import Accelerator

from ...common.together import wait
from ...files import remove_leftovers, replacing

Cell = dict[str, torch.Tensor] | str
"""What is written: tensors, or why there are none."""

SCHEMA = pyarrow.schema({"cell": pyarrow.large_binary()})
OPEN_FILES = 512  # as many stay open; systems allow 1024 and more


@dataclass(frozen=True)
class Cells:
    """The cells of several files, one after the other, each read from disk when it is asked for."""

    paths: Sequence[Path]
    each: int
    """Cells in a file; the last one may have fewer."""

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        number, row = divmod(place, self.each)
        return safetensors.torch.load(_read(self.paths[number], row))

    def problems(self) -> dict[int, str]:
        """Which cells are empty, and why."""
        found = {}
        for number, path in enumerate(self.paths):
            last = _opened(path).num_record_batches - 1
            found |= {number * self.each + row: text for row, text in json.loads(_read(path, last))}
        return found


def cached(paths: Sequence[Path], each: int, make: Callable[[int], Generator[Cell]], accelerator: Accelerator) -> Cells:
    """The cells of all files; each process first writes its share of those that are missing.

    Whether machines share the folder is seen, not asked: after the first round each machine's processes write what
    they still miss, and after the second each process for itself.
    """
    if accelerator.is_local_main_process:
        for folder in {path.parent for path in paths}:
            remove_leftovers(folder)
    for share in _rounds(accelerator):
        for number in _missing(paths, *share):
            with contextlib.closing(make(number)) as cells:
                write(paths[number], cells)
        wait()
    return Cells(paths, each)


def missing(paths: Sequence[Path], accelerator: Accelerator) -> list[int]:
    """Numbers of the files that are not there yet, of this process's share among those of all processes."""
    return _missing(paths, *_rounds(accelerator)[0])


def _rounds(accelerator: Accelerator) -> list[tuple[int, int]]:
    """The first file and the distance to the next of this process's share, round by round."""
    of_all = (accelerator.process_index, accelerator.num_processes)
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return [of_all, (accelerator.local_process_index, of_machine), (0, 1)]


def _missing(paths: Sequence[Path], first: int, distance: int) -> list[int]:
    return [number for number in range(first, len(paths), distance) if not _is_whole(paths[number])]


def write(path: Path, cells: Iterator[Cell]) -> None:
    """Writes a file, whole or not at all, holding one cell in memory at a time."""
    problems = []
    with (
        replacing(path) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, SCHEMA) as writer,
    ):
        for row, cell in enumerate(cells):
            if isinstance(cell, str):
                problems.append((row, cell))
                cell = {}
            tensors = {name: value.cpu().contiguous() for name, value in cell.items()}
            writer.write_batch(_batch(safetensors.torch.save(tensors)))
        writer.write_batch(_batch(json.dumps(problems).encode()))


def _batch(content: bytes) -> pyarrow.RecordBatch:
    return pyarrow.record_batch([pyarrow.array([content], pyarrow.large_binary())], schema=SCHEMA)


def _read(path: Path, row: int) -> bytes:
    return _opened(path).get_batch(row).column(0)[0].as_py()


@functools.lru_cache(OPEN_FILES)
def _opened(path: Path) -> pyarrow.RecordBatchFileReader:
    return pyarrow.ipc.open_file(pyarrow.OSFile(str(path)))


def _is_whole(path: Path) -> bool:
    try:
        return _opened(path) is not None
    except (OSError, pyarrow.ArrowInvalid):  # missing, or cut short when the machine went down
        return False
