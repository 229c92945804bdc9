"""Values of options as they are typed."""

from __future__ import annotations

from typing import Any


def listed(value: Any) -> list:
    """Return the values of a flag that takes one or several; a single one may have no list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def as_typed(value: Any) -> str:
    """Return a flag's value, or its values, as they are typed; "none" of one that is not given."""
    return " ".join(map(str, listed(value))) or "none"
