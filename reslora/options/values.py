"""Format the values of options as on the command line, and refuse values that differ from an earlier run's."""

from typing import Any, NoReturn

from ..errors import InvalidArgument


def listed(value: Any) -> list:
    """Return one or several values of an option as a list; an empty list for None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def as_typed(value: Any) -> str:
    """Return the value or values of an option as typed on the command line; "none" if the option is not given."""
    return " ".join(map(str, listed(value))) or "none"


def refuse_other_value(flag: str, value: object, before: str, earlier: object, otherwise: str) -> NoReturn:
    """Raise `InvalidArgument` for an option that had the value `earlier` when training began.

    `before` is the beginning of the problem, and `otherwise` a fix that keeps the new value.
    """
    fix = "leave it out" if earlier is None else "use that"
    raise InvalidArgument(f"{flag} {as_typed(value)}", f"{before} {as_typed(earlier)}", f"{fix}, or {otherwise}")
