"""Random generators with seeds derived from keys, so that every machine and a resumed run get the same numbers."""

import torch

from ..seeds import derive


def generator(*key: object) -> torch.Generator:
    """Return a generator seeded with `derive(*key)`."""
    return torch.Generator().manual_seed(derive(*key))


def shuffled(length: int, *key: object) -> list[int]:
    """Return a permutation of the numbers below `length`, which depends only on the length and the key."""
    return torch.randperm(length, generator=generator(*key)).tolist()
