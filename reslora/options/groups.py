"""Options in groups: a frozen dataclass a group, and one that holds the groups, which is what a run is made of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar, get_type_hints

from ..common.flags import listed
from .option import Option


class Groups:
    """Base of a dataclass whose fields are groups: the values of one run. Files and messages know flat names."""

    titles: ClassVar[Mapping[str, str]]
    """What help calls each group, in its order."""

    @classmethod
    def table(cls) -> dict[str, Option]:
        """Return all options by name, in order."""
        return _table(cls)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return options with these values, and the defaults of all others."""
        return cls().replace(**values)

    def replace(self, **values: Any) -> Self:
        """Return options in which some have other values. Raises `KeyError` for a name that is none of theirs."""
        changes: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            option = self.table()[name]
            own = list(listed(value)) if option.collapses else value
            changes.setdefault(option.group, {})[option.attribute] = own
        parts: Any = {group: dataclasses.replace(getattr(self, group), **own) for group, own in changes.items()}
        return dataclasses.replace(self, **parts)  # type: ignore[type-var] # subclasses are dataclasses

    def __getitem__(self, name: str) -> Any:
        """Return a value by its option's name."""
        option = self.table()[name]
        return getattr(getattr(self, option.group), option.attribute)

    def flat(self) -> dict[str, Any]:
        """Return all values by name, as `config.json` records them."""
        return {name: _recorded(option, self[name]) for name, option in self.table().items()}


@functools.cache
def _table(kind: type[Groups]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for group, part in get_type_hints(kind).items():
        if group not in kind.titles:
            continue
        kinds = get_type_hints(part)
        for field in dataclasses.fields(part):
            name = field.metadata["name"] or field.name
            facts = {"name": name, "attribute": field.name, "group": group, "kind": kinds[field.name]}
            found[name] = field.metadata["option"](**facts)
    return found


def _recorded(option: Option, value: Any) -> Any:
    if not option.collapses or len(value) > 1:
        return value
    return value[0] if value else None


O = TypeVar("O", bound=Groups)


@dataclass(frozen=True)
class Grid(Generic[O]):
    """An experiment: the options that all its runs share, and the values of those that vary."""

    base: O
    """Those of the first run; `lora_alpha` is None where it follows from ranks that vary."""
    varied: Mapping[str, list]
    """Two or more values of each option that varies, by its name."""

    def values(self, name: str) -> list:
        """Return all values of an option; a list with the only one where it does not vary."""
        return self.varied.get(name) or [self.base[name]]

    def runs(self, *names: str) -> list[O]:
        """Return the options of runs with each combination of the values of `names`."""
        values = [self.values(name) for name in names]
        return [with_alpha(self.base.replace(**dict(zip(names, own, strict=True)))) for own in itertools.product(*values)]

    def flat(self) -> dict[str, Any]:
        """Return all values by name, as `config.json` records them: lists of those that vary."""
        return {**self.base.flat(), **self.varied}

    def replace(self, **values: Any) -> Grid[O]:
        """Return an experiment in which some shared options have other values."""
        return dataclasses.replace(self, base=self.base.replace(**values))
