"""Convert LoRA files between formats, add them, reduce their rank, or extract one from two models.

reslora-convert IN OUT --to kohya
reslora-convert ONE OTHER OUT --to diffusers --weight 0.7 0.5 --rank 16
reslora-convert --extract BASE TUNED OUT --to diffusers --rank 32
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundled import ASSETS
from ..checks import is_path
from ..errors import InvalidArgument, first_line, refused_as
from ..formatting import pluralize, printable
from ..io import read_object
from ..options.argument_parser import Parser
from ..options.option import whole
from ..runtime.stdio import take_any_file_name
from .model.families import FAMILIES, load_family

if TYPE_CHECKING:
    import torch

    from .model.families.base import Family
    from .model.lora_files.names import Names, Parts
    from .model.lora_files.reading import Content

FORMATS = ("diffusers", "kohya", "comfyui", "peft")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the options specify and return the exit status.

    Errors that the user can fix are one line on stderr.
    """
    take_any_file_name()
    try:
        args = build_parser().parse_intermixed_args(argv)
        check_flags(args)
        convert(args)
    except (InvalidArgument, OSError) as error:
        refused = isinstance(error, InvalidArgument)
        problem = printable(" ".join(str(error).split()))
        print(f"reslora-convert: {'error: ' if refused else ''}{problem}", file=sys.stderr)
        return 2 if refused else 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="reslora-convert", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    # fmt: off
    add("inputs", nargs="*", metavar="IN", help="LoRA file of any tool, or folder that PEFT, diffusers or a run wrote")
    add("output", metavar="OUT", help="a name that ends in .safetensors, or a folder")
    add("--overwrite", action="store_true",
        help="replace OUT if it exists; an input, and what is in one, is never replaced")
    add("--to", choices=FORMATS, help="the format of OUT; required")
    add("--base", metavar="MODEL",
        help="the model's folder or name on the hub: its configurations alone are read; default: that of the run which "
             "wrote the first IN")
    add("--family", choices=[*FAMILIES.values()], help="the model's family, where neither --base nor the file says it")
    add("--weight", nargs="+", type=float, metavar="W", help="of each IN in their sum; default: 1")
    add("--rank", type=whole(1), help="reduce layers of more than this rank to it, with the least error")
    add("--extract", nargs=2, metavar=("BASE", "TUNED"),
        help="make the LoRA of TUNED - BASE: safetensors files, or folders in diffusers format")
    add("--dtype", choices=DTYPES,
        help="of the tensors in OUT; default: that of the first IN (float16 if of 8 bits), float32 for --extract")
    # fmt: on
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` for invalid options, before heavy libraries are imported."""
    if args.to is None:  # not argparse's `required`, which would be reported instead of a misspelled option
        raise InvalidArgument("--to", "missing", f"give one of {', '.join(FORMATS)}")
    if args.extract and (args.inputs or args.weight):
        raise InvalidArgument("--extract", "it reads two models, and no IN", "give one or the other")
    if args.extract and not args.rank:
        raise InvalidArgument("--extract", "the difference has any rank", "add --rank N")
    if not args.extract and not args.inputs:
        raise InvalidArgument("IN", "missing", "give a LoRA file and where to write it")
    named = {"IN": args.inputs, "OUT": [args.output], "--extract": args.extract, "--base": [args.base]}
    for argument, texts in named.items():
        if "" in (texts or ()):  # an empty path is the working directory
            raise InvalidArgument(argument, "is empty", "give the name of a file or a folder")
    for argument, texts in {"IN": args.inputs, "--extract": args.extract}.items():
        for missing in (text for text in texts or () if not Path(text).exists()):
            raise InvalidArgument(f"{argument} {missing}", "no such file or folder", "check the name")
    if args.base and not Path(args.base).exists() and is_path(args.base):
        raise InvalidArgument(f"--base {args.base}", "no such folder", "give one in diffusers format")
    if args.weight and len(args.weight) != len(args.inputs):
        problem = f"{pluralize(len(args.weight), 'weight')} for {pluralize(len(args.inputs), 'file')}"
        raise InvalidArgument("--weight", problem, "give one for each IN")
    if args.weight and not all(map(math.isfinite, args.weight)):
        raise InvalidArgument(f"--weight {' '.join(map(str, args.weight))}", "not finite", "give numbers")


def convert(args: argparse.Namespace) -> None:
    """Read, add, reduce and write LoRAs, and print a summary line."""
    import torch

    from .model.lora_files.combining import cast, check_finite, in_short, in_words, reduced
    from .model.lora_files.writing import output_of, write

    path = output_of(args.output, args.to)
    check_overwrite(path, args)
    parts, names, metadata, dtype = extraction(args) if args.extract else sum_of_inputs(args)
    if args.weight:
        check_finite(parts, f"--weight {' '.join(f'{weight:g}' for weight in args.weight)}", "give smaller ones")
    if args.rank and not args.extract:
        parts, errors = reduced(parts, args.rank)
        print(in_words(errors, args.rank))
    dtype = getattr(torch, args.dtype) if args.dtype else dtype
    parts, kind = cast(parts, dtype), str(dtype).removeprefix("torch.")
    check_finite(parts, f"--dtype {kind}", "give a wider one")
    write(parts, names, args.to, path, metadata)
    print(f"{path}: {names.family.name} ({', '.join(parts)}), {in_short(parts)}, {kind}, for {args.to}")


def check_overwrite(path: Path, args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` before replacing an input, or without --overwrite any other file or PEFT directory."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    flag, place = f"OUT {args.output}", path.resolve()
    for text in (*args.inputs, *(args.extract or ())):
        read = Path(text).resolve()
        nested = place.is_relative_to(read) or read.is_relative_to(place)
        if nested or (read.exists() and read.samefile(place)):
            raise InvalidArgument(flag, f"would replace the input {text}, or what is in it", "give another name")
    if not args.overwrite:
        raise InvalidArgument(flag, f"{path} exists", "give another name, or add --overwrite")


def sum_of_inputs(args: argparse.Namespace) -> tuple[Parts, Names, dict[str, str], torch.dtype]:
    """Return the weighted sum of the inputs, the layer names of their model, their common metadata, and the dtype."""
    from .model.lora_files.combining import summed
    from .model.lora_files.reading import read_content, read_parts

    contents = [read_content(Path(text), f"IN {text}") for text in args.inputs]
    names, said = names_for(args, contents)
    loras = [read_parts(content, names) for content in contents]
    try:
        parts = summed(loras, args.weight or [1.0] * len(loras))
    except ValueError as error:
        raise InvalidArgument("IN", first_line(error), "give LoRAs of one model") from None
    first, *others = (content.metadata for content in contents)
    agreed = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return parts, names, said | agreed, contents[0].dtype


def extraction(args: argparse.Namespace) -> tuple[Parts, Names, dict[str, str], torch.dtype]:
    """Return the difference of two models as a LoRA, in the form of `sum_of_inputs`."""
    import torch

    from .content_hash import folder_mark
    from .model.lora_files.combining import in_words
    from .model.lora_files.extracting import Weights, extracted

    base, tuned = map(Path, args.extract)
    if args.base is None and any((base / name).is_file() for name in ("model_index.json", "config.json")):
        args.base = str(base)
    names, said = names_for(args, [])
    one, other = (Weights.of(path, names.family.denoiser, f"--extract {path}") for path in (base, tuned))
    parts, errors, others = extracted(one, other, names, args.rank)
    if not parts[names.family.denoiser]:
        raise InvalidArgument(other.flag, "no layer of it differs from the base", "give a model that was tuned")
    print(in_words(errors, args.rank))
    for part in names.family.text_names:
        folders = [path / part for path in (base, tuned)]
        if all(folder.is_dir() for folder in folders) and len(set(map(folder_mark, folders))) > 1:
            others.append(part)
    if others:
        print(f"not in the LoRA: {len(others)} more that differ or one model alone has, such as {others[0]}")
    return parts, names, said, torch.float32


# -- the model ---------------------------------------------------------------------------------------------------------


def names_for(args: argparse.Namespace, contents: Sequence[Content]) -> tuple[Names, dict[str, str]]:
    """Return the layer names of the LoRA's model, and the metadata of a file's header."""
    from .model.lora_files.names import names_of
    from .model.lora_files.reading import family_of

    by_name = {family: pipeline for pipeline, family in FAMILIES.items()}
    family = load_family(by_name[args.family]) if args.family else None
    if args.base is None:
        if family is None and not contents:
            raise InvalidArgument("--extract", "whose weights these are is not certain", "add --base or --family")
        if family is None and (name := base_of_run(contents[0].path)):
            with contextlib.suppress(InvalidArgument):  # it was moved
                return of_base(name, None)
        return names_of(family or family_of(contents[0])), {}
    return of_base(args.base, family)


def base_of_run(path: Path) -> str | None:
    """Return the base model in the config.json of the run that wrote a file or directory; None outside of a run."""
    path = path.resolve()
    for folder in (path, *path.parents):
        name = read_object(folder / "config.json").get("pretrained_model_name_or_path")
        if isinstance(name, str):
            bundled = ASSETS / Path(name).name  # a path of another machine, or relative to another directory
            moved = not Path(name).exists() and Path(name).parent.name == ASSETS.name and bundled.is_dir()
            return str(bundled) if moved else name
    return None


def of_base(name: str, family: Family | None) -> tuple[Names, dict[str, str]]:
    """Return the layer names and file metadata for a model's directory or its name on the Hub."""
    flag = f"--base {name}"
    if Path(name).is_file():
        raise InvalidArgument(flag, "a single file says nothing of the model", "give a folder in diffusers format")
    with refused_as(flag, "give a pipeline's folder in diffusers format, or its name on the hub"):
        return configured(name, family, flag)


def configured(name: str, family: Family | None, flag: str) -> tuple[Names, dict[str, str]]:
    """Return the layer names and file metadata from the configurations of a pipeline or a denoiser."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    from .model.lora_files.names import names_of

    alone = (Path(name) / "config.json").is_file() and not (Path(name) / "model_index.json").is_file()
    known = [load_family(pipeline) for pipeline in FAMILIES]
    if alone:
        config = read_object(Path(name) / "config.json")
        kind = config.get("_class_name", "model without _class_name")
        fitting = [
            each
            for each in known
            if each.denoiser_class.__name__ == kind and is_sdxls(config) == is_sdxls(each.published)
        ]
    else:
        kind = DiffusionPipeline.load_config(name)["_class_name"]
        fitting = [each for each in known if each.pipeline.__name__ == kind]
    if family is not None:
        fitting = [each for each in fitting if each is family]
    if len(fitting) != 1:
        problem = f"a {kind}" + (f", and --family {family.name}" if family else "")
        raise InvalidArgument(flag, problem, f"give one of {', '.join(FAMILIES)}, or its denoiser")
    (family,) = fitting
    config = family.denoiser_class.load_config(name, **({} if alone else {"subfolder": family.denoiser}))
    names, predicts_v = names_of(family, config), False
    if not alone:
        scheduler: Mapping = DDIMScheduler.load_config(name, subfolder="scheduler")
        predicts_v = scheduler.get("prediction_type") == "v_prediction"
    version, architecture = family.model_version(names.config, predicts_v=predicts_v)
    return names, {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
    }


def is_sdxls(config: Mapping) -> bool:
    """Return whether a U-Net is SDXL's, by its configuration; its class is shared with other families."""
    return config.get("addition_embed_type") == "text_time"
