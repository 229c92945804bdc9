"""Whether the content of an experiment.json is what docs/experiment_json.md, made from the types, documents."""

import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from reslora.experiment.record import Experiment


def unlike(value: Any, kind: Any = Experiment, place: str = "") -> list[str]:
    """Return the places of keys that are missing or not documented, and of values of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(value, dict) and is_typeddict(kind):
        hints = get_type_hints(kind)
        lost = (value.keys() - hints.keys()) | (kind.__required_keys__ - value.keys())
        parts = {name: hints[name] for name in value if name in hints}
    elif isinstance(value, list) and origin in (list, tuple):
        lost, parts = set(), dict.fromkeys(range(len(value)), inner[0])
    elif isinstance(value, dict) and origin is dict:
        lost, parts = set(), dict.fromkeys(value, inner[1])
    else:
        return [] if fits(value, kind, origin, inner) else [place.removesuffix(".")]
    found = [unlike(value[name], part, f"{place}{name}.") for name, part in parts.items()]
    return sum(found, [place + name for name in lost])


def fits(value: Any, kind: Any, origin: Any, inner: tuple) -> bool:
    """Return whether a value has a type without keys."""
    if origin in (types.UnionType, Union):  # `Literal[...] | None` is the latter
        return any(not unlike(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    plain = isinstance(kind, type) and not is_typeddict(kind)
    return kind is Any or (plain and isinstance(value, (int, float) if kind is float else kind))
