"""Convert a LoRA as the options of reslora-convert specify."""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ....bundled import ASSETS
from ....checks import check_writable
from ....errors import InvalidArgument, refused_as
from ....io import read_object
from ..families import FAMILIES, load_family
from ..families.base import Family
from .names import Names, names_of
from .numbered import named
from .reading import Content, family_of, read_content, read_parts
from .reducing import cast, check_finite, in_short, in_words, reduced
from .writing import output_of, write

APART = {"addition_embed_type": "text_time", "guidance_embeds": True}
"""Values in a denoiser's configuration that distinguish families with the same class of denoiser."""


def convert(args: argparse.Namespace) -> None:
    """Read, reduce and write a LoRA, and print a summary line."""
    path = output_of(args.output, args.to)
    check_overwrite(path, args)
    check_writable(path.parent, f"OUT {args.output}")
    content = read_content(Path(args.input), f"IN {args.input}")
    names, metadata = names_for(args, content)
    content = named(content, names)
    parts = read_parts(content, names)
    if args.rank:
        parts, errors = reduced(parts, args.rank)
        print(in_words(errors, args.rank))
    dtype = getattr(torch, args.dtype) if args.dtype else content.dtype
    parts, kind = cast(parts, dtype), str(dtype).removeprefix("torch.")
    check_finite(parts, f"--dtype {kind}", "give a wider one")
    write(parts, names, args.to, path, metadata | content.metadata)
    print(f"{path}: {names.family.name} ({', '.join(parts)}), {in_short(parts)}, {kind}, for {args.to}")


def check_overwrite(path: Path, args: argparse.Namespace) -> None:
    """Raise `InvalidArgument` if the output would replace the input or, without --overwrite, anything else."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    flag, place, read = f"OUT {args.output}", path.resolve(), Path(args.input).resolve()
    if place.is_relative_to(read) or read.is_relative_to(place) or read.samefile(place):
        raise InvalidArgument(flag, f"would replace the input {args.input}, or a file inside it", "give another name")
    if not args.overwrite:
        raise InvalidArgument(flag, f"{path} exists", "give another name, or add --overwrite")


# -- the model ---------------------------------------------------------------------------------------------------------


def names_for(args: argparse.Namespace, content: Content) -> tuple[Names, dict[str, str]]:
    """Return the layer names of the LoRA's base model in all formats, and metadata of that model.

    The metadata is written to the header of the output; it is empty if only the model's family is known.
    """
    family = next((each for each in map(load_family, FAMILIES) if each.name == args.family), None)
    if args.base is not None:
        return of_base(args.base, family)
    if family is None:
        if name := base_of_run(content.path):
            with contextlib.suppress(InvalidArgument):  # the run's base was moved
                return of_base(name, None)
        family = family_of(content)
    return names_of(family), {}


def base_of_run(path: Path) -> str | None:
    """Return the base model of the run that wrote `path`, from config.json; None if that file does not exist."""
    path = path.resolve()
    for folder in (path, *path.parents):
        name = read_object(folder / "config.json").get("pretrained_model_name_or_path")
        if isinstance(name, str):
            bundled = ASSETS / Path(name).name  # a path of another machine, or relative to another directory
            moved = not Path(name).exists() and Path(name).parent.name == ASSETS.name and bundled.is_dir()
            return str(bundled) if moved else name
    return None


def of_base(name: str, family: Family | None) -> tuple[Names, dict[str, str]]:
    """Return the layer names and file metadata of a model; `name` is its directory or its name on the Hub."""
    flag = f"--base {name}"
    if Path(name).is_file():
        raise InvalidArgument(flag, "a single file does not say which model it is for", "give a diffusers folder")
    with refused_as(flag, "give a pipeline's folder in diffusers format, or its name on the hub"):
        alone = (Path(name) / "config.json").is_file() and not (Path(name) / "model_index.json").is_file()
        known = list(map(load_family, FAMILIES))
        if alone:
            config = read_object(Path(name) / "config.json")
            kind = config.get("_class_name", "model without _class_name")
            fitting = [each for each in known if each.denoiser_class.__name__ == kind and not each.edits]
            if len(fitting) > 1:  # several families have this class
                own = [config.get(name) == value for name, value in APART.items()]
                fitting = [each for each in fitting if own == [each.published.get(k) == v for k, v in APART.items()]]
        else:
            kind = DiffusionPipeline.load_config(name)["_class_name"]
            fitting = [each for each in known if each.pipeline.__name__ == kind]
        fitting = [each for each in fitting if family in (None, each)]
        if len(fitting) != 1:
            problem = f"a {kind}" + (f", and --family {family.name}" if family else "")
            raise InvalidArgument(flag, problem, f"give one of {', '.join(FAMILIES)}, or its denoiser")
        (family,) = fitting
        config = family.denoiser_class.load_config(name, **({} if alone else {"subfolder": family.denoiser}))
        names = names_of(family, config)
        scheduler: Mapping = {} if alone else DDIMScheduler.load_config(name, subfolder="scheduler")
        return names, family.metadata(names.config, scheduler.get("prediction_type") == "v_prediction")
