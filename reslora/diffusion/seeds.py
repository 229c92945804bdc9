"""Random numbers as functions of what they are for: the same on every machine and in a resumed run."""

from __future__ import annotations

import torch

from ..common.seeds import derive


def generator(*key: object) -> torch.Generator:
    """Return a generator that starts from `derive(*key)`."""
    return torch.Generator().manual_seed(derive(*key))


def shuffled(length: int, *key: object) -> list[int]:
    """Return the numbers below `length` in an order that depends on the key."""
    return torch.randperm(length, generator=generator(*key)).tolist()
