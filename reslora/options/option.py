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
"""What a resumed run compares. fixed: the value. content: the content that the value names. free: nothing. shown:
nothing, but a new value for a finished method is reported to have no effect. merged: nothing, but a finished method is
merged again.
"""
K = TypeVar("K")
SAME: Any = object()
"""Sentinel: the option has no value of this kind."""


@dataclass(frozen=True)
class Need:
    """A condition under which an option has an effect."""

    met: Callable[[Any], object]
    """Return whether the options of a run satisfy the condition."""
    fix: str
    problem: str = "nothing reads it"
    """The problem otherwise, with other options' values in braces."""
    refuse: bool = True
    """Raise an error; False: print a line, because commands for other scripts may contain the option."""


@dataclass(frozen=True)
class Option:
    """An option of a script. `name` is its name on the command line and its key in files."""

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
    """Value if the option is given without one."""
    choices: Collection[str] = ()
    metavar: str | None = None
    short: str = ""
    """Shorter name on the command line."""
    essential: str = ""
    """Text in the short help; empty: not included."""
    resume: Resume = "fixed"
    varies: bool = False
    """Whether several values make an experiment."""
    in_experiments: str = ""
    """Why an experiment refuses it, with the fix; empty if it does not."""
    bundled: Any = SAME
    """Default for a bundled model; no other model may have this value as a default."""
    bundled_flow: Any = SAME
    """The same for the bundled flow transformer, if it differs."""
    by_family: str = ""
    """Defaults by family, as text; `default` is None until the family is known."""
    or_else: str = ""
    """Addition to its help about a default that depends on other options."""
    path: Literal["", "relative", "absolute"] = ""
    """Whether it may be a path, possibly with `~`, and how `config.json` stores it."""
    collapses: bool = False
    """Whether files store a single value without a list."""
    secret: bool = False
    """Whether `config.json` leaves it out."""
    implies: str = ""
    """Method that becomes the default if the option is given."""
    read_by: str = ""
    """Property of a method's row that states whether the method uses it; empty: all methods do."""
    objective: Literal["", "ddpm", "flow"] = ""
    """The only objective that uses it."""
    samplings: tuple[str, ...] = ()
    """The only timestep samplings that use it."""
    needs: tuple[Need, ...] = ()
    counts_if_given: bool = False
    """Whether giving its default value differs from leaving it out."""
    yields_to: str = ""
    """Option that, given on the command line, removes this one from a run's configuration."""
    compared_as: str = ""
    """What differs between two runs with different values, if their images or losses are not comparable then."""
    kohya: tuple[str, ...] = ()
    """Names in kohya's scripts."""
    diffusers: tuple[str, ...] = ()
    """Names in diffusers' scripts, if they differ."""

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return bool in (self.kind, *get_args(self.kind))

    @property
    def fixed_default(self) -> Any:
        """Default if it is the same for all models and giving it has no effect; else None."""
        if self.counts_if_given or self.bundled is not SAME:
            return None
        return next(iter(self.default), None) if self.collapses else self.default

    @property
    def otherwise(self) -> str:
        """Default as text, for models that are not bundled."""
        return self.by_family or self.or_else or in_words(self.default)

    @property
    def takes_several(self) -> bool:
        """Whether several words may follow it."""
        return self.varies or any(get_origin(kind) is list for kind in (self.kind, *get_args(self.kind)))


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
"""`option` with other values of `Resume`."""


class Again(dict):
    """Properties of an inherited option that a subclass changes."""


def again(**changes: Any) -> Any:
    """Return a field of a `group` for an inherited option with some properties changed."""
    return Again(changes)


@dataclass_transform(frozen_default=True)
def group(kind: type[K]) -> type[K]:
    """Make a class whose fields are options a frozen dataclass."""
    for name, changes in list(vars(kind).items()):
        if isinstance(changes, Again):
            before = kind.__base__.__dataclass_fields__[name].metadata  # type: ignore[union-attr]
            setattr(kind, name, option(**{"name": before["name"], **before["option"].keywords, **changes}))
    return dataclass(frozen=True)(kind)


# -- parsers of values -------------------------------------------------------------------------------------------------


def whole(minimum: int, most: float = math.inf) -> Callable[[str], int]:
    """Return a parser of a whole number from `minimum` to `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if is_whole(int(text), minimum, most):
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {whole_in_words(minimum, most)}")

    return parse


def number(minimum: float = -math.inf, below: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """Return a parser of a finite number in [minimum, below); `exclusive` excludes `minimum`."""

    def parse(text: str) -> float:
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
    return "none" if value is None else "on" if value is True else str(value)  # 1 == True


def steps(text: str) -> int:
    """Return a number of steps; -1 means none."""
    return -1 if text == "-1" else whole(1)(text)


def true_or_false(text: str) -> bool:
    """Return a switch's value in the notation of transformers' scripts."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def buckets(text: str) -> str:
    """Return heights and widths in diffusers' notation, unchanged: `512,512;448,576`.

    Raises `ArgumentTypeError` for another notation.
    """
    if not re.fullmatch(r"\s*\d{1,5}\s*,\s*\d{1,5}\s*(;\s*\d{1,5}\s*,\s*\d{1,5}\s*)*;?\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width;height,width")
    return re.sub(r"\s", "", text).strip(";")


Given = Mapping[str, Any]
"""Values of the options that the user gave, by name."""
