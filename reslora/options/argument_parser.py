"""Command-line parser of all scripts: strict, with errors in one line."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that accepts only complete option names and prints errors in one line, without the usage.

    Negative numbers in any notation are values. For an unknown option the error names the most similar known one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        # argparse's own pattern takes -1e-4 and -inf for options.
        self._negative_number_matcher = re.compile(r"-((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|nan)$", re.IGNORECASE)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments as argparse does; unknown options raise an error with a suggestion."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse_unknown(unknown)
        return values

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Exit with one line that names the unknown options and the most similar known ones."""
        options = [word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)]
        if not options:
            self.error(f"{' '.join(words)}: no option takes this; options begin with --")
        known = self._option_string_actions
        self.error("; ".join(f"{name}: unknown option{did_you_mean(name, known)}" for name in options))

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line: the option's longest name, the value and the problem."""
        message = re.sub(r"^argument (--[\w-]+)(/-[\w-]+)*: ", r"\1: ", message)
        message = re.sub(r"^(--[\w-]+): '([^']*)' is (not|neither) ", r"\1 \2: is \3 ", message)
        self.exit(2, f"{self.prog}: error: {message}\n")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the most similar known name; empty if none is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
