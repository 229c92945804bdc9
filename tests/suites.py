"""Which parameters of a test `pytest` alone tries."""

from collections.abc import Iterable

import pytest


def quick(values: Iterable, *chosen) -> list:
    """Return pytest's parameters for `values`, of which all but the `chosen` are left to `pytest -m exhaustive`."""
    values = list(values)
    assert all(value in values for value in chosen)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in chosen else pytest.mark.exhaustive,
        )
        for value in values
    ]
