"""Derive random seeds from keys, without torch."""

import hashlib


def derive(*key: object) -> int:
    """Return a 63-bit seed that depends only on the key, and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1
