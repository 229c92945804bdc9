"""Validation shared by all scripts: numbers within bounds, installed packages and writable directories."""

import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import InvalidArgument

# Initializations that move a part of the frozen weight into the adapter; the rank determines how much. PEFT repeats the
# initialization when it loads an adapter, so with another rank it would compute another frozen weight.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Return whether a value is a whole number of at least `least` and at most `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole_in_words(least: int, most: float = math.inf) -> str:
    """Return the condition of `is_whole` as text, such as "a whole number of 1 to 8"."""
    return f"a whole number of at least {least}" if most == math.inf else f"a whole number of {least} to {most}"


def is_number(value: float, least: float, below: float = math.inf, exclusive: bool = False) -> bool:
    """Return whether a number is finite as a float and in [least, below); `exclusive` excludes `least`."""
    finite = abs(value) <= sys.float_info.max
    return finite and value < below and (value > least if exclusive else value >= least)


def number_in_words(least: float, below: float = math.inf, exclusive: bool = False) -> str:
    """Return the condition of `is_number` as text, such as "a finite number of at least 0"."""
    if least == -math.inf:
        return "a finite number"
    ends = f" and below {below}" if below < math.inf else ""
    return f"a finite number {'above' if exclusive else 'of at least'} {least}{ends}"


def is_subtracted(init: object) -> bool:
    """Return whether PEFT's `init_lora_weights` subtracts the adapter's initial update from the frozen weight."""
    return str(init).lower().startswith(CHANGES_BASE)


def refuse_changed_base(init: object, flag: str) -> None:
    """Raise `InvalidArgument` for the LoRA that `flag` names if its `init_lora_weights` changed the base model, too."""
    if is_subtracted(init):
        problem = f"its init_lora_weights, {init}, has changed the base model, too"
        raise InvalidArgument(flag, problem, "save it with PEFT's path_initial_model_for_weight_conversion")


def require_package(flag: str, package: str, module: str = "") -> None:
    """Raise `InvalidArgument` naming `flag` unless a package with this module is installed."""
    if importlib.util.find_spec(module or package) is None:
        raise InvalidArgument(flag, f"{package} is not installed", f"pip install {package}, or leave the option out")


def is_path(name: str) -> bool:
    """Return whether a model's name can only be a path: the name of a repository on the Hub has at most one slash."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_writable(folder: Path, argument: str) -> None:
    """Raise `InvalidArgument` naming `argument` unless the directory is writable or can be created."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".", dir=parent)).rmdir()  # `os.access` is wrong about /proc and network drives
    except OSError:
        raise InvalidArgument(argument, f"{parent} is not a writable folder", "choose another folder") from None


def check_apart(folder: str, inputs: Mapping[str, Sequence[str]]) -> None:
    """Raise `InvalidArgument` if --output_dir is one of the directories that the options in `inputs` name."""
    for name, places in inputs.items():
        for place in filter(os.path.isdir, places):
            if Path(place).resolve() == Path(folder).resolve():
                problem = f"is the folder of --{name}, and the run would write its files among those that it reads"
                raise InvalidArgument(f"--output_dir {folder}", problem, "choose another folder")
