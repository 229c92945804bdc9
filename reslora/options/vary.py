"""Read --vary: several values of an option, which make an experiment."""

import argparse
from collections.abc import Mapping, Sequence
from typing import NoReturn

from ..errors import InvalidArgument, refused_as
from .argument_parser import did_you_mean
from .files import checked
from .option import Given, Option, true_or_false


def values_to_vary(words: Sequence[str], table: Mapping[str, Option], given: Given) -> dict[str, list]:
    """Return the values of each option that --vary names, parsed like those of the command line.

    `words` have the form `name=value,value`; a value of a list has the form `item+item`, and one of a switch is true or
    false. `given`: the remaining options of the command line. Raises `InvalidArgument` for an option that is unknown,
    that cannot vary or that is given twice, and for fewer than two values.
    """
    names = {option.short: name for name, option in table.items() if option.short}
    found: dict[str, list] = {}
    for word in words:
        flag, (name, _, text) = f"--vary {word}", word.removeprefix("--").partition("=")
        name = names.get(name, name)
        option = table.get(name)
        if option is None or not (option.can_vary or name == "method"):
            refuse(flag, name, table)
        if name in given or name in found:
            raise InvalidArgument(flag, f"--{name} is given twice", "give its values once")
        words_of: list[str] = text.split(",")
        if len(words_of) < 2 or not all(words_of):
            raise InvalidArgument(flag, "needs two or more values", f"write --vary {name}=FIRST,SECOND")
        values: list = words_of
        if option.is_switch:
            with refused_as(flag, "give true or false", (argparse.ArgumentTypeError,)):
                values = [true_or_false(word) for word in words_of]
        elif option.is_list and name != "method":
            values = [word.split("+") for word in words_of]
            if not all(map(all, values)):
                raise InvalidArgument(flag, "an item is empty", f"write --vary {name}=FIRST+SECOND,THIRD")
        found[name] = checked(option, values, flag)
    return found


def refuse(flag: str, name: str, table: Mapping[str, Option]) -> NoReturn:
    """Raise `InvalidArgument` for an option that --vary does not accept."""
    option, known = table.get(name), ["method", *(name for name, option in table.items() if option.can_vary)]
    if option is not None and option.compared_as:
        problem = f"{name} cannot vary: losses with other {option.compared_as} are not comparable"
        raise InvalidArgument(flag, problem, "make an experiment for each value")
    problem = f"{name} is not an option" if option is None else f"{name} cannot vary"
    near = did_you_mean(name, known).removeprefix("; ")
    raise InvalidArgument(flag, problem, near or f"give one of {', '.join(known)}")
