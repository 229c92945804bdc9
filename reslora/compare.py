"""Compare methods by the results of an experiment, or by losses of any trainer.

reslora-compare runs/my-experiment --check "reslora < lora"
reslora-compare runs/my-experiment --table latex
reslora-compare losses.csv --table markdown
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import InvalidArgument
from .experiment import answers
from .options.argument_parser import Parser
from .runtime.script import print_error
from .runtime.stdio import take_any_file_name


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the options specify, and return the exit status.

    Errors that the user can fix are printed as one line on stderr.
    """
    take_any_file_name()
    try:
        args = build_parser().parse_args(argv)
        if not (args.check or args.table):
            raise InvalidArgument("--check and --table", "both missing", "give one of them")
        return answers.answer(args, Path(args.source))
    except InvalidArgument as error:
        return print_error("reslora-compare", error)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="reslora-compare", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "source",
        metavar="FOLDER",
        help="the output folder of an experiment, or a CSV file of losses with the columns method, seed, item and loss",
    )
    answers.add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
