"""How many bytes of tensors are alive at a time: exact, and alike on every machine, unlike the size of a process."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reslora.images.model.stored import Stored


def reads_at_a_time(monkeypatch) -> list[int]:
    """The list to which each `Stored.read` adds how many of the tensors that were read are alive."""
    alive, most, read = weakref.WeakSet(), [], Stored.read

    def counted(where: Stored, *args) -> torch.Tensor:
        alive.add(value := read(where, *args))
        most.append(len(alive))
        return value

    monkeypatch.setattr(Stored, "read", counted)
    return most


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in its body and still alive: `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.views: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Runs one operation, and counts what it returns."""
        result = function(*args, **(kwargs or {}))
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        older = {value.untyped_storage().data_ptr() for value in given} - self.views.keys()
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not any(tensor is value for value in given):
                self._count(tensor, older)
        return result

    def _count(self, tensor: torch.Tensor, older: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in older:  # a view of something from before
            return
        if key not in self.views:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.views[key] = self.views.get(key, 0) + 1
        weakref.finalize(tensor, self._dies, key, size)

    def _dies(self, key: int, size: int) -> None:
        self.views[key] -= 1
        if not self.views[key]:
            del self.views[key]
            self.now -= size
