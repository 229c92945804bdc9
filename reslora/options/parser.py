"""Command-line parser and help, derived from a table of options."""

import argparse
import os
import textwrap
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from .. import __version__
from ..bundled import ASSETS
from .argument_parser import Parser
from .foreign import foreign_in_words
from .groups import Groups
from .option import SAME, Option, in_words, true_or_false
from .values import listed

WIDTH, COLUMN = 110, 30  # width of the short help, and its second column
CONFIG = "options from a TOML file, or from a run's config.json"


class OptionsParser(Parser):
    """Parse the options of a table; the result contains only the options that are given."""

    def __init__(
        self,
        prog: str,
        kind: type[Groups],
        description: str = "",
        pages: Mapping[str, Callable[[], str]] = MappingProxyType({}),
    ) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=prog, description=description, formatter_class=raw, argument_default=argparse.SUPPRESS,
            add_help=False, usage=f"{prog} [options]",
        )  # fmt: skip
        self.kind, self.table, self.pages = kind, kind.table(), pages
        self.add_argument(
            "--help",
            "-h",
            nargs="?",
            const="",
            metavar="GROUP",
            action=Help,
            help=f"print what is most often needed, or all options of a group: {', '.join([*kind.titles, *pages])}",
        )
        self.add_argument("--help-all", nargs=0, action=Help, help="print all options and exit")
        if not kind.switches_take_values:
            self.add_argument("--config", metavar="FILE", help=f"{CONFIG}; the command line takes precedence")
        self.add_argument(
            "--vary",
            nargs="+",
            action="extend",
            metavar="NAME=VALUE,VALUE",
            help="several values of an option, for an experiment: --vary optimizer=adamw,lion; may be repeated",
        )
        version = f"reslora-sd {__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version and exit")
        groups = {group: self.add_argument_group(title) for group, title in kind.titles.items()}
        for option in self.table.values():
            self.add_option(groups[option.group], option)

    def add_option(self, group: argparse._ArgumentGroup, option: Option) -> None:
        """Add an option of the table to an argparse group."""
        flags = [option.flag, *[f"--{option.short}"] * bool(option.short)]
        default = default_in_words(option)
        said = f"{option.help} ({default})" if default else option.help
        own: dict[str, Any] = {"dest": option.name, "help": said.replace("%", "%%")}
        if option.is_switch and not self.kind.switches_take_values:
            own["action"] = argparse.BooleanOptionalAction
        elif option.is_switch:
            own |= {"nargs": "?", "const": True, "type": true_or_false, "metavar": "True|False"}
        else:
            own |= {"type": option.parse, "metavar": option.metavar}
            own |= {"choices": option.choices} if option.choices else {}
            own |= {"nargs": "+"} if option.takes_several else {}
            own |= {"nargs": "?", "const": option.alone} if option.alone is not SAME else {}
        if self.kind.switches_take_values and "_" in option.name:  # like transformers' parser
            flags.append(option.flag.replace("_", "-"))
        group.add_argument(*flags, **own)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and expand `~` in paths; shells do not expand it in `--option=~/path`."""
        values, unknown = super().parse_known_args(args, namespace)
        return argparse.Namespace(**with_home(vars(values), self.table)), unknown

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Exit with one line that names the unknown options and their replacements."""
        if told := foreign_in_words((word.partition("=")[0] for word in words), self.table):
            self.error(told)
        super().refuse_unknown(words)

    def page(self, group: str | None) -> str:
        """Return the help of a group of options.

        If `group` is None, the page is the help of all options; if `group` is empty, the help of the essential options.
        """
        if not group:
            return short_help(self) if group == "" else self.format_help()
        if group in self.pages:
            return self.pages[group]()
        if group not in self.kind.titles:
            self.error(f"--help {group}: no such group; give one of {', '.join([*self.kind.titles, *self.pages])}")
        page = Parser(prog=self.prog, usage=self.usage, add_help=False)
        titled = page.add_argument_group(self.kind.titles[group])
        for option in self.table.values():
            if option.group == group:
                self.add_option(titled, option)
        return page.format_help()


class Help(argparse.Action):
    """Print a page of help and exit."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        print(parser.page(None if option_string == "--help-all" else values), end="")
        raise SystemExit(0)


def with_home(values: Mapping[str, Any], table: Mapping[str, Option]) -> dict[str, Any]:
    """Return the values with `~` at the beginning of paths expanded."""
    found = dict(values)
    for name in found.keys() & {"config", *(name for name, option in table.items() if option.path)}:
        if (value := found[name]) is not None:
            paths = [os.path.expanduser(path) for path in listed(value)]  # noqa: PTH111 - or a name on the Hub
            found[name] = paths if isinstance(value, list) else paths[0]
    return found


# -- help --------------------------------------------------------------------------------------------------------------


def default_in_words(option: Option) -> str:
    """Return an option's default for the option's help; empty if the help does not mention the default."""
    otherwise = option.otherwise
    if option.bundled is not SAME:
        flow = option.bundled_flow
        others = "" if flow is SAME else f", pipeline-flow: {in_words(flow)}"
        return f"bundled pipeline: {bundled_in_words(option)}{others}; otherwise: {otherwise}"
    said = option.by_family or option.or_else or option.default not in (None, False, [], "")
    return (
        f"default: {in_words(option.default[0]) if option.collapses and option.default else otherwise}" if said else ""
    )


def bundled_in_words(option: Option) -> str:
    """Return the default for bundled models as text, without the names of bundled files."""
    return "what is bundled" if str(option.bundled).startswith(str(ASSETS)) else in_words(option.bundled)


def short_help(parser: OptionsParser) -> str:
    """Return one screen of help: the essential options with defaults, and how to print all options."""
    lines = [(parser.description or "").strip("\n"), "", "options:"]
    for option in parser.table.values():
        if option.essential:
            flag = f"--{option.short or option.name}"
            value = "" if option.is_switch else f" {option.metavar or option.name.rpartition('_')[2].upper()}"
            default = default_in_short(option)
            said = f"{option.essential} ({default})" if default else option.essential
            text, indent = f"  {flag + value:<{COLUMN - 3}} {said}", " " * COLUMN
            if len(flag + value) > COLUMN - 3:
                lines.append(f"  {flag}{value}")
                text = indent + said
            lines += textwrap.wrap(text, WIDTH, subsequent_indent=indent)
    rest = f"--help-all prints all options, and --help GROUP those of one group: {', '.join(parser.kind.titles)}."
    return "\n".join([*lines, "", *textwrap.wrap(rest, WIDTH)]) + "\n"


def default_in_short(option: Option) -> str:
    """Return an option's default in a few words; empty for none or off."""
    otherwise = option.otherwise.partition(";")[0]
    if option.by_family and not otherwise[0].isdigit():
        otherwise = "the model's own"
    if option.bundled is not SAME:
        return f"{bundled_in_words(option)} for bundled models, otherwise {otherwise}"
    return f"default: {otherwise}" if otherwise not in ("", "none", "off", "False") else ""
