"""Write captions for the images of a folder with an image-text model of transformers.

reslora-caption my_images --model Salesforce/blip-image-captioning-large
reslora-caption my_images --model HuggingFaceTB/SmolVLM-500M-Instruct --prompt "Describe this drawing." --prefix sks
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .checks import is_path
from .errors import InvalidArgument
from .options.argument_parser import Parser
from .options.option import whole
from .runtime.script import print_error
from .runtime.stdio import take_any_file_name


def main(argv: Sequence[str] | None = None) -> int:
    """Write captions as the options specify, and return the exit status.

    Errors that the user can fix are printed as one line on stderr.
    """
    take_any_file_name()
    try:
        args = build_parser().parse_args(argv)
        check_flags(args)
        from .images.captioning import caption_folder  # imports torch and transformers, which takes seconds

        caption_folder(args)
    except (InvalidArgument, OSError, RuntimeError) as error:
        return print_error("reslora-caption", error)
    except KeyboardInterrupt:
        print(
            "reslora-caption: stopped; without --overwrite, the same command captions only images without a caption",
            file=sys.stderr,
        )
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="reslora-caption", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("folder", metavar="FOLDER", help="folder of images; its subfolders are read too")
    add("--model", metavar="MODEL", help="folder or hub name of an image-text model with safetensors weights; required")
    add("--prompt", metavar="TEXT",
        help="instruction to a chat model (default: ask for one sentence), or, for another model, first words of each "
             "caption; not written to the caption files")
    add("--prefix", metavar="TEXT", default="", help="text to put before each caption, with a space after it")
    add("--max_new_tokens", type=whole(1), default=75, help="longest caption, in tokens; default: %(default)s")
    add("--batch_size", type=whole(1), default=8, help="number of images captioned together; default: %(default)s")
    add("--overwrite", action="store_true", help="also write new captions for images that have one")
    # fmt: on
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` for invalid options, before heavy libraries are imported."""
    if not args.model:  # not argparse's `required`, which would be reported instead of a misspelled option
        raise InvalidArgument("--model", "missing", "give the folder or hub name of an image-text model")
    if is_path(args.model) and not Path(args.model).is_dir():
        raise InvalidArgument(f"--model {args.model}", "no such folder", "give a model folder in transformers format")
    if not args.folder:  # an empty path is the working directory
        raise InvalidArgument("FOLDER", "is empty", "give the folder of the images")
    if not Path(args.folder).is_dir():
        raise InvalidArgument(f"FOLDER {args.folder}", "no such folder", "check the name")


if __name__ == "__main__":
    sys.exit(main())
