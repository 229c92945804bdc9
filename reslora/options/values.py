"""Format the values of options as on the command line."""

from typing import Any


def listed(value: Any) -> list:
    """Return the values of an option that takes one or several, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def as_typed(value: Any) -> str:
    """Return the value or values of an option as typed on the command line; "none" if it is not given."""
    return " ".join(map(str, listed(value))) or "none"
