"""What an option is: one call of `option` in a dataclass's field says everything about it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin

from ..common.checks import is_number, is_whole, number_in_words, whole_in_words

Resume = Literal["fixed", "content", "free", "shown", "merged"]
"""What a resumed run compares. fixed: the value. content: what the value names. free: nothing. shown: nothing, and a
finished method's new value is reported to have no effect. merged: nothing, and a finished method is merged anew."""
K = TypeVar("K")
SAME: Any = object()
"""Stands for: no value of its own."""


@dataclass(frozen=True)
class Need:
    """What an option needs to have an effect."""

    met: Callable[[Any], object]
    """Of the options of a run: whether it has one."""
    fix: str
    problem: str = "nothing reads it"
    """What is wrong otherwise, with other options' values in braces."""
    refuse: bool = True
    """False: a line says so, as commands for other scripts may have it."""


@dataclass(frozen=True)
class Option:
    """An option of a script. `name` is that of its flag and of its key in files."""

    name: str
    attribute: str
    """The field of the dataclass."""
    group: str
    """The field of `Options` with that dataclass."""
    kind: Any
    """The type of its value in one run."""
    default: Any
    help: str
    parse: Callable[[str], Any] = str
    """Reads one word of the command line."""
    alone: Any = SAME
    """Its value where its flag has none."""
    choices: Collection[str] = ()
    metavar: str | None = None
    short: str = ""
    """A shorter name of its flag."""
    essential: str = ""
    """What the short help says of it; empty where that leaves it out."""
    resume: Resume = "fixed"
    varies: bool = False
    """Whether several values make an experiment."""
    in_experiments: str = ""
    """Why an experiment refuses it, and the fix; empty where it does not."""
    bundled: Any = SAME
    """The default for a bundled model, which must be that of no other."""
    bundled_flow: Any = SAME
    """The same for the bundled flow transformer, where that differs."""
    by_family: str = ""
    """The defaults that models' families have, in words; `default` is None then, until the family is known."""
    or_else: str = ""
    """What its help adds on a default that follows from others."""
    path: Literal["", "relative", "absolute"] = ""
    """Whether it may be a path, which may begin with `~`; and how `config.json` records it."""
    collapses: bool = False
    """Whether files record a single one of its values without a list."""
    secret: bool = False
    """Whether `config.json` leaves it out."""
    implies: str = ""
    """The method that it makes the default."""
    read_by: str = ""
    """The property of a method's row that says whether the method reads it; empty: all do."""
    objective: Literal["", "ddpm", "flow"] = ""
    """The only objective that reads it."""
    samplings: tuple[str, ...] = ()
    """The only ways to sample timesteps that read it."""
    needs: tuple[Need, ...] = ()
    counts_if_given: bool = False
    """Whether giving its default differs from leaving it out."""
    yields_to: str = ""
    """The option that, given on the command line, drops this one of a run's own configuration."""
    compared_as: str = ""
    """What two runs differ in where they differ in it, if images or losses are then not comparable."""
    kohya: tuple[str, ...] = ()
    """Its names in kohya's scripts."""
    diffusers: tuple[str, ...] = ()
    """Its names in diffusers' scripts, where these are others."""

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name}"

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return bool in (self.kind, *get_args(self.kind))

    @property
    def fixed_default(self) -> Any:
        """Its default where that is the same for all models, and giving it changes nothing; else None."""
        if self.counts_if_given or self.bundled is not SAME:
            return None
        return next(iter(self.default), None) if self.collapses else self.default

    @property
    def otherwise(self) -> str:
        """Its default in words, where it is no bundled model's own."""
        return self.by_family or self.or_else or in_words(self.default)

    @property
    def takes_several(self) -> bool:
        """Whether several words may follow its flag."""
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
    """Return a dataclass's field for an option with this default; see `Option` for the other facts."""
    needs = needs if isinstance(needs, tuple) else (needs,)
    facts["essential"] = help if facts.get("essential") is True else facts.get("essential", "")
    fill: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    make = functools.partial(Option, default=default, help=help, parse=parse, needs=needs, **facts)
    return dataclasses.field(**fill, metadata={"option": make, "name": name})


free, shown, by_content = (functools.partial(option, resume=resume) for resume in ("free", "shown", "content"))
"""The same of options that a resumed run may have other values of; see `Resume`."""


class Again(dict):
    """Facts of an option that a base class has, where they are others."""


def again(**changes: Any) -> Any:
    """Return a field of a `group` for an option that its base class has, with some facts changed."""
    return Again(changes)


@dataclass_transform(frozen_default=True)
def group(kind: type[K]) -> type[K]:
    """Make a class whose fields are options a frozen dataclass."""
    for name, changes in list(vars(kind).items()):
        if isinstance(changes, Again):
            before = kind.__base__.__dataclass_fields__[name].metadata  # type: ignore[union-attr]
            setattr(kind, name, option(**{"name": before["name"], **before["option"].keywords, **changes}))
    return dataclass(frozen=True)(kind)


# -- what the command line and files may say ---------------------------------------------------------------------------


def whole(minimum: int, most: float = math.inf) -> Callable[[str], int]:
    """Return what reads a whole number of at least `minimum`, and at most `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if is_whole(int(text), minimum, most):
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {whole_in_words(minimum, most)}")

    return parse


def number(minimum: float = -math.inf, below: float = math.inf, exclusive: bool = False) -> Callable[[str], float]:
    """Return what reads a finite number in [minimum, below), or above `minimum` when `exclusive`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if is_number(value, minimum, below, exclusive):
                return int(value) if value.is_integer() and re.fullmatch(r"\d+", text) else value
        raise argparse.ArgumentTypeError(f"{text!r} is not {number_in_words(minimum, below, exclusive)}")

    return parse


COUNT, NATURAL = whole(1), whole(0)
"""What read whole numbers from one and from zero on."""
POSITIVE, NOT_NEGATIVE = number(0, exclusive=True), number(0)
FRACTION, PART = number(0, below=1), number(0, below=1, exclusive=True)
"""What read numbers below one; a part is not nothing."""


def in_words(value: Any) -> str:
    """Return an option's value as a person would write it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else "on" if value is True else str(value)  # 1 is equal to True


def steps(text: str) -> int:
    """Read a number of steps; -1 is none."""
    return -1 if text == "-1" else whole(1)(text)


def true_or_false(text: str) -> bool:
    """Read a switch as transformers' scripts have it."""
    if text.lower() in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        return text.lower() in ("yes", "true", "t", "y", "1")
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def buckets(text: str) -> str:
    """Read heights and widths, as diffusers' scripts spell them: `512,512;448,576`."""
    if not re.fullmatch(r"\s*\d{1,5}\s*,\s*\d{1,5}\s*(;\s*\d{1,5}\s*,\s*\d{1,5}\s*)*;?\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not height,width;height,width")
    return re.sub(r"\s", "", text).strip(";")


Given = Mapping[str, Any]
"""Values by name, of those options alone that somebody gave."""
