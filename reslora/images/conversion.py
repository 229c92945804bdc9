"""Convert a LoRA file between formats, and reduce its rank.

reslora-convert IN OUT --to kohya
reslora-convert IN OUT --to diffusers --rank 16
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checks import is_path
from ..errors import InvalidArgument
from ..options.argument_parser import Parser
from ..options.option import whole
from ..runtime.script import print_error
from ..runtime.stdio import take_any_file_name
from .model.families import FAMILIES

FORMATS = ("diffusers", "kohya", "comfyui", "peft")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the options specify and return the exit status.

    Errors that the user can fix are one line on stderr.
    """
    take_any_file_name()
    try:
        args = build_parser().parse_args(argv)
        check_flags(args)
        from .model.lora_files.converting import convert  # imports torch and diffusers, which takes seconds

        convert(args)
    except (InvalidArgument, OSError) as error:
        return print_error("reslora-convert", error)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="reslora-convert", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("input", metavar="IN", help="LoRA file of any tool, or folder that PEFT, diffusers or a run wrote")
    add("output", metavar="OUT", help="a name that ends in .safetensors, or a folder")
    add("--overwrite", action="store_true",
        help="replace OUT if it exists; IN, and files inside it, are never replaced")
    add("--to", choices=FORMATS, help="the format of OUT; required")
    add("--base", metavar="MODEL",
        help="folder or hub name of the base model, of which only configurations are read; default: that of the run "
             "which wrote IN")
    add("--family", choices=[*FAMILIES.values()], help="the model's family, if neither --base nor the file decides it")
    add("--rank", type=whole(1), help="reduce layers of a higher rank to this rank, with the least error")
    add("--dtype", choices=DTYPES,
        help="dtype of OUT's tensors; default: that of IN (float16 if it has 8 bits)")
    # fmt: on
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` for invalid options, before heavy libraries are imported."""
    if args.to is None:  # not argparse's `required`, which would be reported instead of a misspelled option
        raise InvalidArgument("--to", "missing", f"give one of {', '.join(FORMATS)}")
    for argument, text in {"IN": args.input, "OUT": args.output, "--base": args.base}.items():
        if text == "":  # an empty path is the working directory
            raise InvalidArgument(argument, "is empty", "give the name of a file or a folder")
    if not Path(args.input).exists():
        raise InvalidArgument(f"IN {args.input}", "no such file or folder", "check the name")
    if args.base and not Path(args.base).exists() and is_path(args.base):
        raise InvalidArgument(f"--base {args.base}", "no such folder", "give one in diffusers format")
