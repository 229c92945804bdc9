"""Choose the parameters of a test that `pytest` runs without `-m exhaustive`."""

from collections.abc import Iterable

import pytest


def quick(values: Iterable, *chosen) -> list:
    """Return pytest's parameters for `values`; those that are not `chosen` run only with `-m exhaustive`."""
    values = list(values)
    assert all(value in values for value in chosen)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in chosen else pytest.mark.exhaustive,
        )
        for value in values
    ]
