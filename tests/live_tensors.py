"""Count the bytes of tensors that are alive at a time: exact and, unlike process memory, equal on every machine."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reslora.images.model.stored import Stored


def reads_at_a_time(monkeypatch) -> list[int]:
    """Return the list to which each `Stored.read` appends how many of the tensors that it has read are alive."""
    alive, most, read = weakref.WeakSet(), [], Stored.read

    def counted(where: Stored, *args) -> torch.Tensor:
        alive.add(value := read(where, *args))
        most.append(len(alive))
        return value

    monkeypatch.setattr(Stored, "read", counted)
    return most


class LiveTensors(TorchDispatchMode):
    """Count the bytes of the tensors that were made in this context and are alive; `peak` is the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.views: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation, and count the tensors that it returns."""
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
