"""Definition of an option: one call of `option` in a dataclass field states all its properties."""

import argparse
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin

from ..checks import is_number, is_whole, number_in_words, whole_in_words

Resume = Literal["fixed", "content", "free", "shown", "merged"]
"""What a resumed run compares with the earlier run.

- fixed: the value of the option.
- content: the content of the files that the value names.
- free: nothing.
- shown: nothing. If a method has finished, a message says that a new value has no effect on the method.
- merged: nothing. If a method has finished, the method is merged again with the new value.
"""
K = TypeVar("K")
SAME: Any = object()
"""Sentinel for a property whose value is not defined; None may be a value."""


@dataclass(frozen=True)
class Need:
    """A condition under which an option has an effect."""

    met: Callable[[Any], object]
    """Return whether the options of a run satisfy the condition."""
    fix: str
    problem: str = "it has no effect"
    """Message if the condition is not satisfied; option names in braces are replaced by the options' values."""
    refuse: bool = True
    """Whether to raise an error, or only to print a line, because commands for other scripts may contain the option."""


@dataclass(frozen=True)
class Option:
    """An option of a script. `name`: the name of the option on the command line and its key in files."""

    name: str
    attribute: str
    """Field of its group."""
    group: str
    """Field of `Options` that holds its group."""
    kind: Any
    """Type of its value in one run."""
    default: Any
    help: str
    parse: Callable[[str], Any] = str
    """Parser of one word of the command line."""
    alone: Any = SAME
    """Value if the option is given without a value."""
    choices: Collection[str] = ()
    metavar: str | None = None
    short: str = ""
    """Shorter name on the command line."""
    essential: str = ""
    """Text in the short help; empty: not included."""
    resume: Resume = "fixed"
    varies: bool = False
    """Whether several values make an experiment."""
    variable: bool = False
    """Whether `--vary` accepts the option: runs with different values share the model, the data and the measured
    losses.
    """
    unshared: str = ""
    """What runs of one seed no longer share if the option varies, as text."""
    in_experiments: str = ""
    """Why an experiment refuses the option, with the fix; empty if experiments accept the option."""
    bundled: Any = SAME
    """Default for bundled models; `default` is the one for all other models."""
    bundled_flow: Any = SAME
    """Default for the bundled flow transformer, if this default differs from `bundled`."""
    by_family: str = ""
    """Defaults by family of models, as text; the option's value is None until the family is known."""
    or_else: str = ""
    """The default as text for the help, if the default depends on other options."""
    path: Literal["", "relative", "absolute"] = ""
    """Whether the value may be a path, possibly with `~`, and how `config.json` stores the path."""
    collapses: bool = False
    """Whether files store a single value without a list."""
    secret: bool = False
    """Whether `config.json` leaves it out."""
    implies: str = ""
    """Method that becomes the default if the option is given."""
    read_by: str = ""
    """Attribute of `registry.Method` that states whether a method uses the option; empty: all methods use it."""
    objective: Literal["", "ddpm", "flow"] = ""
    """The only objective that uses it."""
    samplings: tuple[str, ...] = ()
    """The only timestep samplings that use it."""
    needs: tuple[Need, ...] = ()
    counts_if_given: bool = False
    """Whether giving the option's default value differs from leaving the option out."""
    yields_to: str = ""
    """Another option, from which this one may be derived.

    If the other option is given on the command line, the value of this option in a config.json is ignored.
    """
    compared_as: str = ""
    """What differs between two runs with different values of the option, as text, so that their images or losses are
    not comparable.

    Empty if they are comparable.
    """
    kohya: tuple[str, ...] = ()
    """Names in kohya's scripts."""
    diffusers: tuple[str, ...] = ()
    """Names of the option in diffusers' scripts, if they differ."""

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        """Whether the option is a switch, whose values are on and off."""
        return bool in (self.kind, *get_args(self.kind))

    @property
    def is_list(self) -> bool:
        """Whether the option's value in one run is a list."""
        return any(get_origin(kind) is list for kind in (self.kind, *get_args(self.kind)))

    def several(self, value: Any) -> list | None:
        """Return `value` if it is a list with a value of this option for each run; None if it is one value."""
        given = isinstance(value, list) and (not self.is_list or any(isinstance(one, list) for one in value))
        return value if self.can_vary and given else None

    @property
    def can_vary(self) -> bool:
        """Whether the option may have several values in an experiment."""
        return self.varies or self.variable

    @property
    def fixed_default(self) -> Any:
        """The default, if the default is the same for all models and giving it is equivalent to leaving the option out;
        else None.

        For a switch without a fixed default, the result is the switch's value in most cases, as `or_else` says.
        """
        if self.counts_if_given or self.bundled is not SAME:
            return None
        if self.is_switch and self.default is None:
            return self.or_else.startswith("on")
        return next(iter(self.default), None) if self.collapses else self.default

    @property
    def otherwise(self) -> str:
        """Default for models that are not bundled, as text."""
        return self.by_family or self.or_else or in_words(self.default)

    @property
    def takes_several(self) -> bool:
        """Whether several values may follow the option on the command line."""
        return self.varies or self.is_list


def option(
    default: Any,
    help: str,
    parse: Callable[[str], Any] = str,
    *,
    name: str = "",
    needs: Need | tuple[Need, ...] = (),
    **facts: Any,
) -> Any:
    """Return a dataclass field for an option with this default; see `Option` for the other properties."""
    needs = needs if isinstance(needs, tuple) else (needs,)
    facts["essential"] = help if facts.get("essential") is True else facts.get("essential", "")
    fill: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    make = functools.partial(Option, default=default, help=help, parse=parse, needs=needs, **facts)
    return dataclasses.field(**fill, metadata={"option": make, "name": name})


free, shown, by_content = (functools.partial(option, resume=resume) for resume in ("free", "shown", "content"))
"""`option` with another value of `resume`."""


class Again(dict):
    """Properties of an inherited option that a subclass changes."""


def again(**changes: Any) -> Any:
    """Return the field of an inherited option with some of its properties changed, for a class decorated by `group`."""
    return Again(changes)


@dataclass_transform(frozen_default=True)
def group(kind: type[K]) -> type[K]:
    """Return the class as a frozen dataclass; all its fields are options."""
    for name, changes in list(vars(kind).items()):
        if isinstance(changes, Again):
            before = kind.__base__.__dataclass_fields__[name].metadata  # type: ignore[union-attr]
            setattr(kind, name, option(**{"name": before["name"], **before["option"].keywords, **changes}))
    return dataclass(frozen=True)(kind)


# -- parsers of values -------------------------------------------------------------------------------------------------


def whole(minimum: int, most: float = math.inf) -> Callable[[str], int]:
    """Return a parser of a whole number from `minimum` to `most`."""

    def parse(text: str) -> int:
        """Return the whole number that `text` contains."""
        with contextlib.suppress(ValueError):
            if is_whole(int(text), minimum, most):
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {whole_in_words(minimum, most)}")

    return parse


def number(minimum: float = -math.inf, below: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """Return a parser of a finite number in [minimum, below); `exclusive` excludes `minimum`."""

    def parse(text: str) -> float:
        """Return the number that `text` contains; an `int` if it is written as one."""
        with contextlib.suppress(ValueError):
            value = float(text)
            if is_number(value, minimum, below, exclusive):
                return int(value) if value.is_integer() and re.fullmatch(r"\d+", text) else value
        raise argparse.ArgumentTypeError(f"{text!r} is not {number_in_words(minimum, below, exclusive)}")

    return parse


COUNT, NATURAL = whole(1), whole(0)
"""Parsers of whole numbers from 1, and from 0."""
POSITIVE, NOT_NEGATIVE = number(0, exclusive=True), number(0)
FRACTION, PART = number(0, below=1), number(0, below=1, exclusive=True)
"""Parsers of numbers from 0 to below 1; `PART` excludes 0."""


def in_words(value: Any) -> str:
    """Return an option's value as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else "on" if value is True else str(value)  # `is`, because 1 == True


def steps(text: str) -> int | None:
    """Return a number of steps; -1 means none."""
    return None if text == "-1" else whole(1)(text)


def true_or_false(text: str) -> bool:
    """Return the value of a switch that is written as in transformers' scripts: yes, true, 0 ..."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def buckets(text: str) -> str:
    """Return heights and widths in diffusers' notation, `512,512;448,576`, without white space.

    Raises `ArgumentTypeError` for another notation.
    """
    if not re.fullmatch(r"\s*\d{1,5}\s*,\s*\d{1,5}\s*(;\s*\d{1,5}\s*,\s*\d{1,5}\s*)*;?\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width;height,width")
    return re.sub(r"\s", "", text).strip(";")


Given = Mapping[str, Any]
"""Values of the options that the user gave, by name."""
