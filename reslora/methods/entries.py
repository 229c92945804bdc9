"""Entries of PEFT's method comparison as methods: `--method experiments/lora/llama-3.2-3B-rank32`.

An entry is a folder with `adapter_config.json` and maybe `training_params.json`, as in
https://github.com/huggingface/peft/tree/main/method_comparison. The name of such a method is `peft--` and the path with
two hyphens for each slash, which is a safe name of a folder: every process finds the entry by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, refused_as

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIGURATION = "adapter_config.json"
SETTINGS = "training_params.json"
PREFIX, SLASH = "peft--", "--"
NAME = re.compile(rf"{PREFIX}[\w.-]+", re.ASCII)
FIX = f"give a folder with {CONFIGURATION}, such as experiments/lora/llama-3.2-3B-rank32"


def is_entry(name: object) -> bool:
    """Return whether this is the name of a method that stands for an entry."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def entry_of(text: str) -> str | None:
    """Return the name of the method for the path of an entry; None for other texts.

    Raises `ArgumentTypeError`'s base `ValueError` for a path with characters that the name cannot hold.
    """
    if "/" not in text and not Path(text, CONFIGURATION).is_file():
        return None
    path = Path(text).as_posix()
    name = PREFIX + path.replace("/", SLASH)
    if SLASH in path or not is_entry(name):
        problem = "the path of an entry may only have letters, digits, and single '.', '-' and '_' between slashes"
        raise ValueError(f"{text!r}: {problem}; rename the folder, or start in another one")
    return name


def folder_of(name: str) -> Path:
    """Return the folder of an entry from the name of its method."""
    return Path(name.removeprefix(PREFIX).replace(SLASH, "/"))


def configured(name: str) -> Callable[[Any, Any], PeftConfig]:
    """Return the function of an entry that returns its configuration for a model and `AdapterSettings`.

    All settings are the entry's: the function reads `targets` if the entry names no layers, and `total_steps`. Raises
    `InvalidArgument` if the folder has no configuration.
    """
    folder = folder_of(name)
    if not (folder / CONFIGURATION).is_file():
        raise InvalidArgument(f"--method {folder}", f"there is no {CONFIGURATION}", FIX)

    def configure(model: Any, settings: Any) -> PeftConfig:
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(str(folder))
        if getattr(config, "target_modules", "") is None:
            config.target_modules = set(settings.targets)
        if hasattr(config, "total_step"):
            config.total_step = settings.total_steps
        return config

    return configure


def settings_in_words(name: str) -> str | None:
    """Return the settings of training that an entry has, and that no run applies, as a line; None if it has none."""
    path = folder_of(name) / SETTINGS
    if not path.is_file():
        return None
    with refused_as(f"--method {folder_of(name)}", f"correct or remove {SETTINGS}"):
        found = json.loads(path.read_text())
        values = {**found.pop("optimizer_kwargs", {}), **found}
        words = ", ".join(f"{key} {value}" for key, value in values.items())
    return f"--method {folder_of(name)}: {SETTINGS} is not applied; to train like this entry, give options for {words}"
