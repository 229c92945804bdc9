"""The flags of a run as one object."""

from __future__ import annotations

import argparse
from typing import Any


class Flags(argparse.Namespace):
    """All flags with their values, which do not change any more."""

    def __init__(self, **values: object) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be changed: use replace")

    def replace(self, **changes: object) -> Flags:
        """A copy in which some flags have other values."""
        return Flags(**{**vars(self), **changes})


def listed(value: Any) -> list:
    """The values of a flag that takes one or several; a single one may have no list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def as_typed(value: Any) -> str:
    """A flag's value, or its values, as they are typed; "none" of one that is not given."""
    return " ".join(map(str, listed(value))) or "none"
