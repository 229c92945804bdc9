"""The command line of a training: what a form's values are as words for `train_sd.py`. The page only starts it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.commands.config.config_args import default_config_file

from reslora.images.prompts import SUFFIXES as PROMPT_FILES
from reslora.images.settings import build_parser
from reslora.options.images import Options
from reslora.options.option import Option
from reslora.options.parser import OptionsParser
from reslora.options.values import listed

from . import form
from .bases import bundled, model_of
from .library import refuse_language
from .runs import Run, RunError

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "train_sd.py"
ADDED_TO = ("method", "learning_rate", "seed")
"""Options that an experiment which was begun may be given more values of."""
MAY_GROW = (*ADDED_TO, "experiment_minutes", "arms_at_once")
"""Options that need not be as an experiment was begun with."""
LARGEST_RANK = 512
"""Above it, a warning."""
ALONE = "Several methods alone are a run: give several learning rates or seeds, or start it under Train."


def default_output() -> Path:
    """Where a trainer without --output_dir writes."""
    return Path(Options.of().output.output_dir)


def arguments(settings: dict, with_defaults: bool = False) -> list[str]:
    """Command-line words for the settings that differ from the trainer's defaults; refuses what its parser refuses."""
    words = []
    for name, option in form.known().items():
        value = settings.get(name)
        if value in (None, "", []) or (str(value) == str(option.fixed_default) and not with_defaults):
            continue
        if option.is_switch:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif values := words_of(option, value):
            words += [f"--{name}", *values]
    trainers_parser().parse_args(words)
    return words


def words_of(option: Option, value: object) -> list[str]:
    """A flag's value, or values, as words of a command line."""
    found = [str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in listed(value)]
    if option.name == "validation_prompt":
        found = [line.strip() for line in "\n".join(found).replace("\0", "").splitlines() if line.strip()]
        if len(found) == 1 and found[0].lower().endswith(PROMPT_FILES):
            raise RunError("Files of prompts are read by train_sd.py alone; write the prompts, one a line.")
    elif option.takes_several and isinstance(value, str):  # with spaces between them; numbers may have commas, too
        found = (value.replace(",", " ") if option.parse is not str else value).split()
    if any(re.match(r"-(?!\d)", word) for word in found):  # it would be another flag
        raise RunError(f"{option.name} cannot begin with a hyphen.")
    known = () if option.choices else form.choices(option)  # the trainer imports any optimizer by its path
    if known and (wrong := [word for word in found if word not in known]):
        raise RunError(f"{option.name} {wrong[0][:80]}: choose from {', '.join(known)}.")
    return found


def trainers_parser() -> OptionsParser:
    """The trainer's own; where it refuses, its one line is the message."""
    parser = build_parser()
    parser.error = refuse  # type: ignore[method-assign] # where it would print the line and leave
    return parser


def refuse(message: str) -> NoReturn:
    raise RunError(message)


def refuse_others(begun: Run, settings: dict, images: Path | None) -> None:
    """`RunError` for what an experiment was not begun with, but for what may grow; what is not given is as it is."""
    read = [Path(name).resolve() for name in begun.words("train_data_dir")]
    if images is not None and read != [images.resolve()]:
        raise RunError(f"{begun.name} was begun with other images: choose another name, or leave the images out.")
    known, model = form.known(), str(settings.get("model") or "").strip()
    given = {flag: value for flag, value in settings.items() if flag in known and flag not in MAY_GROW}
    given = {flag: value for flag, value in given.items() if value not in (None, "", [])}
    asked, others = vars(build_parser().parse_args(arguments(given, True))), []
    for flag, value in given.items():
        was = begun.config.get(flag, known[flag].fixed_default)
        # The form has no word for some that a command line may have given: it shows them as if they were not there.
        if listed(asked.get(flag, was)) != listed(was) and value != form.widget_value(known[flag], was):
            others.append(form.as_flag(known[flag], was))
    was_model = begun.word("pretrained_model_name_or_path") or ""
    if model and model not in (was_model, bundled(was_model)):
        others.append(f"the model {bundled(was_model) or was_model}")
    if others:
        raise RunError(f"{begun.name} was begun with {', '.join(others[:5])}: give that, or choose another name.")


def with_more(begun: Run, settings: dict) -> dict:
    """What may grow of an experiment, with what a form adds; what is empty there is left out, and stays as it is."""
    more = {flag: settings[flag] for flag in MAY_GROW if settings.get(flag) not in (None, "", [])}
    asked = vars(build_parser().parse_args(arguments(more, True)))
    for flag in more.keys() & set(ADDED_TO):
        there = listed(begun.config.get(flag))
        more[flag] = [*there, *(value for value in listed(asked[flag]) if value not in there)]
    return more


def words_for(folder: Path, settings: dict, images: Path | None = None, begun: Run | None = None) -> list[str]:
    """Return the words after `accelerate launch` for a new run; refuses what the trainer refuses.

    `begun`: an experiment in the folder, which gets the methods, rates and seeds that it has not; all else must be as
    it was begun.
    """
    words = [str(SCRIPT), "--output_dir", str(folder)]
    if begun is not None:
        refuse_language(begun)
        refuse_others(begun, settings, images)
        return [*words, "--config", str(begun.folder / "config.json"), *arguments(with_more(begun, settings), True)]
    if settings.get("method") == []:  # the trainer would take its default
        raise RunError("Tick at least one method.")
    if images is not None:
        words += ["--train_data_dir", str(images)]
    if model := str(settings.get("model") or "").strip():
        words += ["--pretrained_model_name_or_path", model_of(model, images)]
    return words + arguments(settings)


def warning(settings: dict) -> str:
    """What is likely a mistake in the settings of a training that starts nevertheless; empty where nothing is."""
    ranks = [int(word) for value in listed(settings.get("rank")) for word in re.findall(r"\d+", str(value))]
    largest = max(ranks, default=0)
    if largest <= LARGEST_RANK:
        return ""
    return f" warning: {largest} is a larger rank than most layers have room for; 4 to 128 are usual."


def launch_words(device: str | None) -> list[str]:
    """`accelerate launch`, told the defaults that it would warn of; what its configuration file says holds."""
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    has_file = Path(default_config_file).is_file()
    if not has_file:
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if device is not None or (not has_file and torch.cuda.device_count() < 2):
        words += ["--num_processes", "1"]
    return words


def environment(device: str | None = None) -> dict[str, str]:
    """Of a trainer, which gets one GPU where there is one for each."""
    found = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": search_path()}
    return found if device is None else found | {"CUDA_VISIBLE_DEVICES": device}


def search_path() -> str:
    """PYTHONPATH with which the trainer finds the library although it runs in another folder."""
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def safe_name(name: str) -> str:
    """A run's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:64] or "run"


def in_words(words: list[str]) -> str:
    """The command as one would type it in the repository."""
    shown = []
    for word in words:
        path = Path(word)
        inside = path.is_absolute() and path.is_relative_to(REPOSITORY)
        shown.append(str(path.relative_to(REPOSITORY)) if inside else word)
    return "accelerate launch " + shlex.join(shown)
