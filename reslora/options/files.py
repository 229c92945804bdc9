"""Read options from a TOML file, or from an earlier run's config.json, which also contains default values."""

import argparse
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, first_line, refused_as
from .argument_parser import did_you_mean
from .foreign import foreign_in_words
from .option import Option
from .parser import with_home
from .values import listed

FORMS = "give a TOML file or a run's config.json"
REMOVED = {"shortcut_scale": "sum"}
"""Defaults of removed options, except None and False, that the config.json of an earlier run has."""


def read_file(path: Path, table: Mapping[str, Option], given: Collection[str], prog: str) -> dict[str, Any]:
    """Return the values of a file, validated like the values of the command line.

    `given` are the names of the options on the command line. A value in a config.json is left out if it may have been
    derived from one of these options (`Option.yields_to`).
    """
    where, names = f"--config {path}", {option.short: name for name, option in table.items() if option.short}
    content = {names.get(name, name): value for name, value in read_table(path).items()}
    if told := foreign_in_words((f"--{name}" for name in content), table):
        raise InvalidArgument(where, *told.split("; ", 1))
    found = {}
    for name, value in content.items():
        if name not in table:
            if path.suffix == ".json" and value in (None, False, REMOVED.get(name)):
                continue  # an option of an earlier version, which was not given
            problem = f"{name} is not a flag of {prog}{did_you_mean(name, table)}"
            raise InvalidArgument(where, problem, "rename or remove it")
        # An alpha in a TOML file is the user's; an alpha in a config.json may have been derived from the rank.
        resolved = path.suffix == ".json" or name != "lora_alpha"
        if value is not None and value != [] and not (resolved and table[name].yields_to in given):
            found[name] = checked(table[name], value, where)
    return with_home(found, table)


def read_table(path: Path) -> dict[str, Any]:
    """Return the content of a TOML or JSON file.

    Raises `InvalidArgument` if the file is not a flat table.
    """
    where = f"--config {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(where, f"cannot be read ({first_line(error)})", FORMS) from None
    if not isinstance(content, dict):
        raise InvalidArgument(where, "is not a table of flags", FORMS)
    for name, value in content.items():
        if any(isinstance(each, dict) for each in listed(value)):
            raise InvalidArgument(where, f"{name} is a table", "write all flags at the top level")
    return content


def checked(option: Option, value: object, where: str) -> Any:
    """Return a file's value as the command line would parse it.

    Raises `InvalidArgument` for an invalid value.
    """
    name, several = option.name, option.several(value)
    if several is not None and (option.is_switch or option.is_list):
        return [checked(option, one, where) for one in several]
    if isinstance(value, list) and not (option.takes_several or option.variable):
        raise InvalidArgument(where, f"{name} = {value} is a list", "give one value")
    if isinstance(value, bool) != option.is_switch:
        problem = "give true or false" if option.is_switch else "give a value"
        raise InvalidArgument(where, f"{name} = {value}", problem)
    if option.is_switch:
        return value
    items = []
    for item in listed(value):
        with refused_as(f"{where}, {name}", "correct it", (argparse.ArgumentTypeError, ValueError)):
            item = option.parse(str(item))
        if option.choices and item not in option.choices:
            problem, fix = f"{item!r} is not a choice", f"give one of {list(option.choices)}"
            raise InvalidArgument(f"{where}, {name}", problem, fix)
        items.append(item)
    return items if option.takes_several or isinstance(value, list) else items[0]
