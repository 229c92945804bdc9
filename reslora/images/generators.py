"""Random generators derived from keys: the same on every machine and in a resumed run."""

import torch

from ..seeds import derive


def generator(*key: object) -> torch.Generator:
    """Return a generator seeded with `derive(*key)`."""
    return torch.Generator().manual_seed(derive(*key))


def shuffled(length: int, *key: object) -> list[int]:
    """Return a permutation of the numbers below `length` that depends on the key."""
    return torch.randperm(length, generator=generator(*key)).tolist()
