"""Find options that have no effect in combination with other options, and raise an error or print these options."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..config import PLAIN
from ..errors import InvalidArgument, speaks
from ..methods.entries import is_entry, settings_in_words
from ..methods.registry import METHODS
from .grid import Grid, alpha_of
from .groups import Groups
from .option import Need, Option
from .shared import RunOptions
from .values import as_typed


def as_option(option: Option, value: Any) -> str:
    """Return an option and its value as typed on the command line."""
    return option.flag if value is True else f"{option.flag} {as_typed(value)}"


def unmet(options: Groups, refuse: bool) -> list[tuple[Option, Need]]:
    """Return the options that differ from their default, but have no effect because a condition is not satisfied.

    Only conditions whose `Need.refuse` equals `refuse` are tested.
    """
    return [
        (option, need)
        for name, option in options.table().items()
        if options[name] != option.default
        for need in option.needs
        if need.refuse is refuse and not need.met(options)
    ]


def refuse_unused(options: Groups) -> None:
    """Raise `InvalidArgument` for an option without effect, unless it has its default value."""
    for option, need in unmet(options, refuse=True):
        raise InvalidArgument(as_option(option, options[option.name]), need.problem.format_map(options), need.fix)


def report_unused(asked: RunOptions | Grid) -> None:
    """Print options without effect in any run that commands for other scripts may contain."""
    options, *others = asked.variants() if isinstance(asked, Grid) else [asked]
    read = [{option.name for option, _ in unmet(other, refuse=False)} for other in others]
    for option, need in unmet(options, refuse=False) if speaks() else ():
        if all(option.name in names for names in read):
            problem = ": ".join(filter(None, [need.problem.format_map(options), need.fix]))
            print(f"{as_option(option, options[option.name])}: {problem}", flush=True)


def is_read(option: Option, methods: Iterable[str]) -> bool:
    """Return whether one of the methods uses the option."""
    return not option.read_by or any(getattr(METHODS[name], option.read_by) for name in methods)


def report_unread_by_methods(asked: RunOptions | Grid) -> None:
    """Print options that no method uses, unless they have their default values.

    Options that no method uses are not errors, because a command may be reused for other methods; only
    --init_lora_weights is. Also print a warning if --pre_num 0 leaves a method without the shortcuts that it otherwise
    has.
    """
    options, values = asked.base if isinstance(asked, Grid) else asked, asked.flat()
    defaults = {"lora_alpha": alpha_of(dataclasses.replace(options.adapter, lora_alpha=None))}
    names = options.adapter.method
    for name, option in options.table().items():
        if is_read(option, names) or values[name] in (None, defaults.get(name, option.default)):
            continue
        argument, problem = as_option(option, values[name]), f"it has no effect with --method {' '.join(names)}"
        if name == "init_lora_weights":  # another start would be trained than the one that was asked for
            raise InvalidArgument(argument, problem, "add --method lora, or leave it out")
        if speaks():
            print(f"{argument}: {problem}", flush=True)
    for name in names:
        if is_entry(name) and (words := settings_in_words(name)) and speaks():
            print(words, flush=True)
    unwired = [name for name in names if values["pre_num"] == 0 and METHODS[name].reads_shortcut]
    if unwired and values["shortcut"] != PLAIN and speaks():
        print(f"warning: --pre_num 0: blocks get no shortcut terms, so {' and '.join(unwired)} trains as LoRA does")
