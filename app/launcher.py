"""Convert the form's values to the command line of `train_sd.py`."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.commands.config.config_args import default_config_file

from reslora.errors import InvalidArgument
from reslora.images.prompts import SUFFIXES as PROMPT_FILES
from reslora.images.settings import build_parser, parsed_values
from reslora.options.option import Option
from reslora.options.parser import OptionsParser
from reslora.options.values import listed

from . import form
from .bases import model_of
from .runs import Run, RunError

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "train_sd.py"
EMPTY = (None, "", [])
"""Values in the form for which the option is not passed to the trainer."""


def arguments(settings: dict, with_defaults: bool = False) -> list[str]:
    """Return command-line arguments for the settings that differ from the trainer's defaults.

    `with_defaults`: include the settings that are equal to the defaults. Raises `RunError` for a value that the
    trainer's parser does not accept.
    """
    words = []
    for name, option in form.known().items():
        value = settings.get(name)
        if value in EMPTY or (form.in_box(value) == form.in_box(option.fixed_default) and not with_defaults):
            continue
        if option.is_switch and not isinstance(value, bool):
            raise RunError(f"{name} {str(value)[:40]}: give true or false.")
        if option.is_switch:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif values := words_of(option, value):
            words += [f"--{name}", *values]
    trainers_parser().parse_args(words)
    return words


def words_of(option: Option, value: object) -> list[str]:
    """Return the values of an option as command-line arguments. Raises `RunError` for an invalid value."""
    found = [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in listed(value)]
    if option.name == "validation_prompt":
        found = [line.strip() for line in "\n".join(found).replace("\0", "").splitlines() if line.strip()]
        if len(found) == 1 and found[0].lower().endswith(PROMPT_FILES):
            raise RunError("Prompt files work only on the command line; enter the prompts here, one per line.")
    elif option.takes_several and isinstance(value, str):  # separated by spaces; numbers also by commas
        found = (value.replace(",", " ") if option.parse is not str else value).split()
    if any(re.match(r"-(?!\d)", word) for word in found):  # it would be parsed as another option
        raise RunError(f"{option.name}: a value cannot begin with a hyphen.")
    # The trainer would import an optimizer or a method by its path.
    known = form.choices(option) if not option.choices or option.name == "method" else ()
    if known and (wrong := [word for word in found if word not in known]):
        raise RunError(f"{option.name} {wrong[0][:80]}: choose from {', '.join(known)}.")
    return found


def parsed(settings: dict) -> dict:
    """Convert the form's settings to the types of the trainer's options, and the model to its path or hub name."""
    words, model = arguments(settings, True), str(settings.get("model") or "")
    try:
        found = parsed_values(trainers_parser(), words)
    except InvalidArgument as error:  # an option that varies and has a value of its own
        raise RunError(str(error)) from None
    return found | ({form.MODEL: model_of(model, Path())} if model else {})


def trainers_parser() -> OptionsParser:
    """Return the trainer's parser, which here raises `RunError` for an error instead of exiting."""
    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign] # the original prints the message and exits
    return parser


def refuse(message: str) -> NoReturn:
    """Raise `RunError` with this message."""
    raise RunError(message)


def words_for(folder: Path, settings: dict, images: Path | None, begun: Run | None) -> list[str]:
    """Return the arguments after `accelerate launch` for training in `folder`. Raises `RunError` for invalid settings.

    `begun`: an existing experiment in the folder, whose settings apply where `settings` has none.
    """
    words = [str(SCRIPT), "--output_dir", str(folder)]
    if begun:
        words += ["--config", str(begun.folder / "config.json")]
    if settings.get("method") == []:  # the trainer would use its default
        raise RunError("Select at least one method.")
    if images:
        words += ["--train_data_dir", str(images)]
    if model := str(settings.get("model") or "").strip():
        words += ["--pretrained_model_name_or_path", model_of(model, images or folder if begun else images)]
    return words + arguments(settings, with_defaults=begun is not None)


def launch_words() -> list[str]:
    """Return the `accelerate launch` command, with explicit defaults so that accelerate does not warn.

    If the user has an accelerate config file, its values are used instead.
    """
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    has_file = Path(default_config_file).is_file()
    if not has_file:
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if not has_file and torch.cuda.device_count() < 2:
        words += ["--num_processes", "1"]
    return words


def environment() -> dict[str, str]:
    """Return the environment variables of a trainer."""
    # PYTHONPATH contains the repository, because the trainer's working directory is another folder.
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def safe_name(name: str) -> str:
    """Return a run's name in a form that is safe as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:64] or "run"


def in_words(words: list[str]) -> str:
    """Return a training command as one would type it in the repository's folder."""
    return "accelerate launch " + shlex.join(word.removeprefix(f"{REPOSITORY}{os.sep}") for word in words)
