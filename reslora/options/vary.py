"""Read --vary: several values of an option, which make an experiment."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from ..errors import InvalidArgument
from .argument_parser import did_you_mean
from .files import checked
from .option import Given, Option


def values_to_vary(words: Sequence[str], table: Mapping[str, Option], given: Given) -> dict[str, list]:
    """Return the values of each option that --vary names, parsed like those of the command line.

    `words` have the form `name=value,value`; `given`: the other options of the command line. Raises `InvalidArgument`
    for an option that is unknown, that cannot vary or that is given twice, and for fewer than two values.
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
        values = text.split(",")
        if len(values) < 2 or not all(values):
            raise InvalidArgument(flag, "needs two or more values", f"write --vary {name}=FIRST,SECOND")
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
