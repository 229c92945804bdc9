"""The command-line parser of all scripts: strict, with one line for an error."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Take whole option names only, and print one line for an error, without a screen of usage before it.

    Negative numbers in any notation are values. An unknown option is refused with the known one that is nearest.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        # argparse's own pattern takes -1e-4 and -inf for options.
        self._negative_number_matcher = re.compile(r"-((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|nan)$", re.IGNORECASE)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the values as argparse does."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse_unknown(unknown)
        return values

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the values as argparse does."""
        values, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            self.refuse_unknown(unknown)
        return values

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Exit with one line that names the unknown options, and the known ones nearest to them."""
        options = [word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)]
        if not options:
            self.error(f"{' '.join(words)}: no option takes this; options begin with --")
        known = self._option_string_actions
        self.error("; ".join(f"{name}: unknown option{did_you_mean(name, known)}" for name in options))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, which begins with the option, by its longest name, and the value."""
        message = re.sub(r"^argument (--[\w-]+)(/-[\w-]+)*: ", r"\1: ", message)
        message = re.sub(r"^(--[\w-]+): '([^']*)' is (not|neither) ", r"\1 \2: is \3 ", message)
        self.exit(2, f"{self.prog}: error: {message}\n")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name that is nearest, or an empty text where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
