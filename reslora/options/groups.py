"""Groups of options: a frozen dataclass for each group, and one that holds the groups of a run."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self, get_type_hints

from .option import Option
from .values import listed

DEFAULTS: Any = object()
"""The default of a field of `Groups`: the group with the defaults of its options."""


class Groups:
    """Base of the dataclasses that hold the options of one run; each field of such a class is a group of options.

    Files and messages name an option without its group.
    """

    titles: ClassVar[Mapping[str, str]]
    """Title of each group in the help, in order."""
    switches_take_values: ClassVar[bool] = False
    """Whether a switch is turned off by `--name False` instead of `--no-name`."""

    def __init_subclass__(cls) -> None:
        for name, value in list(vars(cls).items()):
            if value is DEFAULTS:
                setattr(cls, name, dataclasses.field(default_factory=cls.__annotations__[name]))

    @classmethod
    @functools.cache
    def table(cls) -> dict[str, Option]:
        """Return all options by name, in order."""
        found: dict[str, Option] = {}
        parts = get_type_hints(cls)
        for group in cls.titles:
            part = parts[group]
            kinds = get_type_hints(part)
            for field in dataclasses.fields(part):
                name = field.metadata["name"] or field.name
                facts = {"name": name, "attribute": field.name, "group": group, "kind": kinds[field.name]}
                found[name] = field.metadata["option"](**facts)
        return found

    @classmethod
    def option(cls, name: str) -> Option:
        """Return an option by its name in this script, or by the name common to all scripts."""
        return cls._by_any_name()[name]

    @classmethod
    @functools.cache
    def _by_any_name(cls) -> dict[str, Option]:
        return {option.attribute: option for option in cls.table().values()} | cls.table()

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return options with these values, and the default of every other option."""
        return cls().replace(**values)

    def replace(self, **values: Any) -> Self:
        """Return options with some values replaced.

        Raises `KeyError` for an unknown name.
        """
        changes: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            option = self.option(name)
            own = list(listed(value)) if option.collapses else value
            changes.setdefault(option.group, {})[option.attribute] = own
        parts: Any = {group: dataclasses.replace(getattr(self, group), **own) for group, own in changes.items()}
        return dataclasses.replace(self, **parts)  # type: ignore[type-var] # subclasses are dataclasses

    def __getitem__(self, name: str) -> Any:
        """Return the value of an option by its name."""
        option = self.option(name)
        return getattr(getattr(self, option.group), option.attribute)

    def flat(self) -> dict[str, Any]:
        """Return all values by name, as `config.json` stores them."""
        found = {}
        for name, option in self.table().items():
            found[name] = self[name]
            if option.collapses and len(found[name]) < 2:
                found[name] = next(iter(found[name]), None)
        return found
