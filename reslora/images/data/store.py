"""Store encoded items on disk, in safetensors files that several processes and runs write and share.

Each item has one file, named by its key: a hash of everything that the item depends on. An item has one or several
variants; every tensor in the file starts with the dimension of the variants. The file's metadata has a checksum of the
tensors. For an item that could not be encoded, a text file has the reason.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from ...errors import RunFailed, first_line
from ...io import remove_leftovers, replacing
from ...runtime.processes import wait

Item = Mapping[str, torch.Tensor] | str
"""The tensors of an item's variants, or the reason why the item could not be encoded."""

TENSORS, REASON = ".safetensors", ".txt"
CHECKSUM = "crc32"  # name of the checksum in the files' metadata


class Encoded:
    """Encoded items, stored in a folder under their keys, and read from disk on access.

    Their files are named `<kind>-<key>`. Items with equal keys are stored once.
    """

    def __init__(self, folder: Path, kind: str, keys: Sequence[int]) -> None:
        self.folder, self.kind, self.keys = folder, kind, np.asarray(keys, np.int64)

    def name(self, number: int) -> str:
        """Return the name of an item's file, without its suffix."""
        return f"{self.kind}-{self.keys[number]:016x}"

    def read(self, number: int, variant: int = 0) -> dict[str, torch.Tensor]:
        """Return a variant of an item; `variant` wraps around if the item has fewer variants.

        Raises `OSError` if the file is missing or damaged.
        """
        path = self.folder / (self.name(number) + TENSORS)
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.offset_keys()}
                chosen = {name: variant % part.get_shape()[0] for name, part in parts.items()}
                return {name: part[chosen[name] : chosen[name] + 1][0].clone() for name, part in parts.items()}
        except SafetensorError as error:
            fix = "remove it, and its content is encoded anew"
            raise OSError(f"{path} is damaged ({first_line(error)}): {fix}") from None

    def problems(self) -> dict[int, str]:
        """Return the reasons why items could not be encoded, by the item's index."""
        reasons, names = self._reasons(), map(self.name, range(len(self.keys)))
        return {number: reasons[name] for number, name in enumerate(names) if name in reasons}

    def missing(self) -> list[int]:
        """Return the indices of the items without a file; if items have the same key, only the first index."""
        there = {path.stem for path in self.folder.glob(f"{self.kind}-*{TENSORS}")} | self._reasons().keys()
        return [number for number in self._distinct() if self.name(number) not in there]

    def damaged(self) -> list[Path]:
        """Return the files whose content does not have the checksum that was stored with it."""
        paths = [self.folder / (self.name(number) + TENSORS) for number in self._distinct()]
        with ThreadPoolExecutor() as pool:
            return list(itertools.compress(paths, pool.map(_is_damaged, paths)))

    def _distinct(self) -> list[int]:
        _, first = np.unique(self.keys, return_index=True)
        return np.sort(first).tolist()

    def _reasons(self) -> dict[str, str]:
        found = {path.stem: path.read_text(encoding="utf-8") for path in self.folder.glob(f"{self.kind}-*{REASON}")}
        return {name: reason for name, reason in found.items() if reason}  # a crash of the system may empty a file

    def write(self, number: int, item: Item) -> None:
        """Write an item atomically."""
        suffix = REASON if isinstance(item, str) else TENSORS
        with replacing(self.folder / (self.name(number) + suffix)) as temporary:
            if isinstance(item, str):
                temporary.write_text(item, encoding="utf-8")
            else:
                tensors = {name: value.cpu().contiguous() for name, value in item.items()}
                save_file(tensors, temporary, metadata={CHECKSUM: _checksum(save(tensors))})


def _checksum(content: bytes) -> str:
    """Return the checksum of a safetensors file's content: names, shapes, dtypes and bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    tensors = {name: about for name, about in json.loads(content[8:end]).items() if name != "__metadata__"}
    return f"{zlib.crc32(memoryview(content)[end:], zlib.crc32(json.dumps(tensors, sort_keys=True).encode())):08x}"


def _is_damaged(path: Path) -> bool:
    try:
        content = path.read_bytes()
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(CHECKSUM) != _checksum(content)
    except FileNotFoundError:  # nothing is stored yet
        return False
    except SafetensorError:
        return True


def remove_damaged(encoded: Encoded, accelerator: Accelerator) -> None:
    """Remove damaged files, so that `fill` writes them again, and print a warning; one process per machine does so."""
    if accelerator.is_local_main_process and (damaged := encoded.damaged()):
        for path in damaged:
            path.unlink(missing_ok=True)
        what = f"{damaged[0]} is" if len(damaged) == 1 else f"{len(damaged)} files, such as {damaged[0]}, are"
        print(f"warning: {what} damaged or without a checksum; encoding the content again", flush=True)
    wait()


def fill(encoded: Encoded, make: Callable[[Sequence[int]], Generator[Item]], accelerator: Accelerator) -> None:
    """Write this process's share of the missing items; `make` maps indices to items.

    Processes need not know whether their machines share the folder. There are three rounds, each for the items that are
    still missing. In the first round, all processes divide these items. In the second, the processes of each machine
    divide them. In the third, each process writes every item that it does not find. Raises `RunFailed` if written files
    vanish.
    """
    if accelerator.is_local_main_process:
        remove_leftovers(encoded.folder)
    for round_ in range(len(_rounds(accelerator))):
        numbers = share(encoded, accelerator, round_)
        wait()  # a process that sees new files of another process would compute other shares
        if numbers:
            with contextlib.closing(make(numbers)) as items:
                for number, item in zip(numbers, items, strict=True):
                    encoded.write(number, item)
        wait()
    if encoded.missing():
        raise RunFailed(f"{encoded.folder}: files written there have disappeared; start the run again")


def share(encoded: Encoded, accelerator: Accelerator, round_: int = 0) -> list[int]:
    """Return the indices of the items that this process writes in a round."""
    first, distance = _rounds(accelerator)[round_]
    return encoded.missing()[first::distance]


def _rounds(accelerator: Accelerator) -> list[tuple[int, int]]:
    """Return, for each round, the first item of this process's share and the stride to the next."""
    of_all = (accelerator.process_index, accelerator.num_processes)
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return [of_all, (accelerator.local_process_index, of_machine), (0, 1)]
