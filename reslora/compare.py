"""Compare LoRA files of any tool, image by image, with confidence intervals; or read the results of an experiment.

    reslora-compare --model MODEL --data my_images a.safetensors b.safetensors 'epochs/*.safetensors'
    reslora-compare --model MODEL --data my_images --group lora='lora-*.safetensors' other='other-*.safetensors'
    reslora-compare runs/my-experiment --table latex
    reslora-compare comparison --check "a < b"
    reslora-compare --peft_results peft/method_comparison

The first form measures the denoising loss of each file, and of the base model, on the same images, timesteps and
noise. This form prints which files are best, and writes report.html, comparison.json and losses.csv. Give images with
captions that no file was trained on, at least 6 and better 30. In the second form, the files of a group are trainings
of one method with different seeds, and the result is about the methods. The next two print a table of results, or check
a claim with an exit status for scripts; they read an experiment, a comparison, or a CSV file of losses of any trainer.
The last one says what the results of PEFT's method comparison, with one seed each, can and cannot tell.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InvalidArgument
from .experiment import answers
from .experiment.peft_results import print_peft_results
from .experiment.record import EXPERIMENT
from .formatting import pluralize
from .images.comparison.files import Entry, entries_of, groups_of
from .images.refusals import check_folders, check_places, check_prompts
from .images.settings import with_defaults
from .options.argument_parser import Parser
from .options.grid import first_of
from .options.images import Options
from .options.option import Option, number
from .runtime.script import limit_spinning, print_error, run_script
from .runtime.signals import StopRequest
from .runtime.stdio import take_any_file_name

PROG = "reslora-compare"
READ = (
    "pretrained_model_name_or_path", "train_data_dir", "conditioning_data_dir", "resolution",
    "use_aspect_ratio_buckets", "caption_column", "image_column", "caption_prefix", "test_groups",
    "pretrained_vae_model_name_or_path", "prediction_type", "mixed_precision", "max_sequence_length",
    "guidance_scale_train", "validation_prompt", "num_inference_steps", "guidance_scale", "seed", "metric_model",
    "cache_dir",
)  # fmt: skip
"""Options of train_sd.py that this command has, too, with the same meaning."""
HELP = {
    "pretrained_model_name_or_path": "base model of the files, of any family: a folder in diffusers' format, a "
    ".safetensors file or a name on the hub; required",
    "train_data_dir": "folder of images with captions that no file was trained on, as for train_sd.py; required; may "
    "be repeated",
    "validation_prompt": "prompt of a sample image of each file, or a file with prompts; may be repeated",
    "seed": "seed of the sample images; default: 0",
    "resolution": "side of the square that images are cropped and scaled to; default: that of the model's family",
    "conditioning_data_dir": "edit models: folder of reference images for each --data, with the same file names",
    "caption_prefix": "text put before every caption, such as a trigger word",
    "use_aspect_ratio_buckets": "measure each image near its own aspect ratio",
    "mixed_precision": "precision in which images and captions are encoded; losses are computed in float32; "
    "default: no, which is float32",
    "guidance_scale_train": "guidance scale that Flux.1 and FLUX.2 dev get as input; default: 1",
    "num_inference_steps": "steps of a sample image",
    "cache_dir": "folder for downloads and encoded images; default: the hub's own, and <output_dir>/cache",
    "metric_model": "also measure similarities of sample images, with this CLIP or DINOv2: a folder or a name on the "
    "hub",
    "test_groups": "folder: images of one folder resemble each other and count as one",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the options say, and return the exit status; user errors are one line on stderr."""
    limit_spinning()
    take_any_file_name()
    args = build_parser().parse_args(argv)
    if not (args.check or args.table or args.peft_results):
        return run_script(PROG, lambda _, stop: start(vars(args), stop))
    try:
        if args.peft_results:
            print_peft_results(Path(args.peft_results), Path(args.output_dir), args.reference)
            return 0
        if len(args.files) != 1:
            problem = f"{pluralize(len(args.files), 'folder')} of results given"
            raise InvalidArgument("--check" if args.check else "--table", problem, "give one")
        return answers.answer(args, Path(args.files[0]))
    except (InvalidArgument, OSError) as error:
        return print_error(PROG, error)


def start(given: dict[str, Any], stop: StopRequest) -> None:
    """Check the options, and import heavy libraries only then."""
    results = [path for path in map(Path, given["files"]) if path.suffix == ".csv" or (path / EXPERIMENT).is_file()]
    if given.pop("evaluations") or (results and "pretrained_model_name_or_path" not in given):
        raise InvalidArgument("--check and --table", "both missing", "give one of them")
    strengths = list(dict.fromkeys(given.pop("strength")))
    files, groups, reference = given.pop("files"), given.pop("group"), given.pop("reference")
    given = {name: value for name, value in given.items() if name not in ("check", "table", "peft_results")}
    if files and groups:
        raise InvalidArgument(f"FILE {files[0]}", "given next to --group", "put all files into groups")
    entries = groups_of(groups) if groups else entries_of(files)
    options = options_of(given)
    check_reference(reference, entries)
    from .images.comparison.run import compare_files  # imports torch and diffusers, which takes seconds

    compare_files(options, entries, strengths, reference, stop)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    raw = argparse.RawDescriptionHelpFormatter
    usage = "reslora-compare --model MODEL --data FOLDER [options] FILE..."
    parser = Parser(prog=PROG, usage=usage, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("files", metavar="FILE", nargs="*",
        help="LoRA file of any tool, or folder that PEFT, diffusers or a run wrote; or a pattern such as "
             "'epoch-*.safetensors'")
    add("--group", nargs="+", action="extend", default=[], metavar="NAME=FILE",
        help="files of one method, each trained with another seed: a file, or a pattern; several with the same NAME "
             "add up. All groups need the same number of files")
    add("--strength", nargs="+", type=number(), default=[1.0], metavar="NUMBER",
        help="compare each file at each of these strengths; default: 1")
    add("--reference", metavar="NAME",
        help="file or group with which the others are compared: its name in the table, or base; default: the first, or "
             "base if there is only one")
    add("--peft_results", metavar="FOLDER",
        help="say what the results of PEFT's method comparison can tell about each pair of methods: its folder "
             "method_comparison, or one of its folders of results")
    add("--output_dir", default="comparison", metavar="FOLDER", help="folder for the results; default: %(default)s")
    # fmt: on
    table = Options.table()
    for name in READ:
        add_option(parser, table[name])
    answers.add_arguments(parser)
    return parser


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Add an option of train_sd.py. Lists are made by repetition, because file names may follow."""
    flags = [*[f"--{option.short}"] * bool(option.short), option.flag]
    own: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    own["help"] = HELP.get(option.name) or f"{option.help}; default: {option.otherwise}".replace("%", "%%")
    if option.is_switch:
        own["action"] = "store_true"
    else:
        own |= {"type": option.parse, "metavar": option.metavar, "choices": option.choices or None}
        own |= {"action": "append"} if option.is_list else {}
    parser.add_argument(*flags, **own)


def options_of(given: dict[str, Any]) -> Options:
    """Return the options of train_sd.py that decide how losses are measured; raises `InvalidArgument` for bad ones."""
    for name, flag, fix in (
        ("pretrained_model_name_or_path", "--model", "give the files' base model"),
        ("train_data_dir", "--data", "give a folder of images with captions"),
    ):
        if not given.get(name):
            raise InvalidArgument(flag, "missing", fix)
    if len(given.get("resolution", ())) > 1:
        raise InvalidArgument("--resolution", "given twice", "give one")
    for name in ("train_data_dir", "conditioning_data_dir"):
        given |= {name: [str(Path(folder).expanduser()) for folder in given[name]]} if name in given else {}
    # what trains is not used, but the options have to be complete
    unused = {"method": ["lora"], "rank": 1, "max_train_steps": 1, "report_to": "none", "validation_split": 0.0}
    given.setdefault("mixed_precision", "no")  # also for a bundled model, which would be trained in bf16
    prompts = {"num_validation_images": 1, "validation_prompt": given.get("validation_prompt", [])}
    options, _ = first_of(Options, with_defaults(given | unused | prompts))
    check_folders(options.data)
    check_prompts(options.validation, options.data.references_per_image)
    check_places(options)
    return options


def check_reference(name: str | None, entries: Sequence[Entry]) -> None:
    """Raise `InvalidArgument` if the reference is none of the files or groups."""
    names = [*(entry.name for entry in entries), "base"]
    if name is not None and name not in names:
        raise InvalidArgument(f"--reference {name}", "is not compared", f"give one of {', '.join(names)}")


if __name__ == "__main__":
    sys.exit(main())
