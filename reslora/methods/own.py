"""Methods that a user brings: `--method package.module:function`, and every tuner of PEFT: `--method peft:VeraConfig`.

The name of such a method has a dot in place of the colon, `package.module.function`. This form of the name is a safe
name of a folder, and the module can be imported from it in every process. `entries.py` has the names of PEFT's
experiment folders.

Functions import PEFT and torch when they are called, so that `--help` appears at once.
"""

from __future__ import annotations

import colorsys
import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, first_line, refused_as
from . import entries

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+", re.ASCII)
FORM = "package.module:function, peft:CLASS such as peft:VeraConfig, or a folder with PEFT's adapter_config.json"
FIX = "correct it, or give another method"
FIX_ON_META = "correct it; before training, it gets a model of shapes without values"
_WHERE = "the module must be in the current folder or on the Python path"


LARGE_ERROR = 0.01
"""Relative error that reports mention."""
CONVERSION = "conversion.json"
"""File with the result of a conversion, next to the exported files."""


def conversion_in_words(record: Mapping[str, Any]) -> str:
    """Return the content of `conversion.json` as text."""
    words = f"plain LoRA by PEFT's conversion, of rank {record['rank']}: its relative error is {record['error']:.2g}"
    if record["delta_error"] > LARGE_ERROR:
        words += f"; all files have delta(), from which forward() differs by {100 * record['delta_error']:.2g}%"
    return words


def is_own(name: object) -> bool:
    """Return whether this is the name of a method that a user brings."""
    return isinstance(name, str) and (NAME.fullmatch(name) is not None or entries.is_entry(name))


def name_of(text: str) -> str:
    """Return the name of a method that the user brings; return other texts unchanged.

    Raises `ValueError` for the path of a folder that no name can hold.
    """
    if name := entries.entry_of(text):
        return name
    return name if is_own(name := text.replace(":", ".")) else text


def flag_of(name: str) -> str:
    """Return the option that messages name, as the user has typed it."""
    if entries.is_entry(name):
        return f"--method {entries.folder_of(name)}"
    module, _, function = name.rpartition(".")
    return f"--method {module}:{function}"


def title_of(name: str) -> str:
    """Return the name for display: of a class of PEFT without "Config"; of a function with its module."""
    if entries.is_entry(name):
        return " ".join(entries.folder_of(name).parts[-2:])
    module, _, function = name.rpartition(".")
    if module == "peft":
        return function.removesuffix("Config")
    return f"{function.replace('_', ' ')} ({module.rpartition('.')[2]})"


def help_of(name: str) -> str:
    """Return a description in one line."""
    if entries.is_entry(name):
        return f"the entry {entries.folder_of(name)} of PEFT's method comparison"
    module, _, function = name.rpartition(".")
    return f"PEFT's {function}" if module == "peft" else f"the function {function} of the module {module}"


def color_of(name: str) -> str:
    """Return a color that depends only on the name."""
    parts = colorsys.hls_to_rgb(zlib.crc32(name.encode()) % 360 / 360, 0.42, 0.65)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def find(name: str) -> Callable:
    """Import the module of a method, and return its function or its class of PEFT's configurations.

    Raises `InvalidArgument` if the module cannot be imported, or has no such function.
    """
    if entries.is_entry(name):
        return entries.configured(name)
    module, _, function = name.rpartition(".")
    flag = flag_of(name)
    if os.getcwd() not in sys.path:  # noqa: PTH109 - entries are texts
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        content = importlib.import_module(module)
    except Exception as error:  # a user's module can raise anything
        problem = f"{module} cannot be imported ({first_line(error)})"
        raise InvalidArgument(flag, problem, f"give {FORM}; {_WHERE}") from None
    found = getattr(content, function, None)
    if not callable(found) or (module == "peft" and not is_configuration(found)):
        kind = "configuration" if module == "peft" else "function"
        able = [key for key, value in vars(content).items() if callable(value) and not key.startswith("_")]
        if module == "peft":
            able = [key for key in dir(content) if key.endswith("Config")]
        near = difflib.get_close_matches(function, able, n=1)
        problem = f"{module} has no {kind} {function}" + (f"; did you mean {near[0]}?" if near else "")
        raise InvalidArgument(flag, problem, f"give {FORM}")
    return found


def is_configuration(value: object) -> bool:
    """Return whether a value is a class of PEFT's configurations."""
    from peft import PeftConfig

    return isinstance(value, type) and issubclass(value, PeftConfig)


def fields_of(name: str) -> set[str] | None:
    """Return the settings of a class of PEFT's configurations; None for a function, which receives every option.

    The set is empty for an entry of PEFT's method comparison: its files give all settings.
    """
    if entries.is_entry(name):
        return set()
    if name.rpartition(".")[0] != "peft":
        return None
    with contextlib.suppress(InvalidArgument):
        return {field.name for field in dataclasses.fields(find(name))}  # type: ignore[arg-type]
    return set()


def dropout_in(fields: set[str]) -> str | None:
    """Return the name of the dropout in the settings of a configuration; PEFT's `module_dropout` skips layers."""
    return next((name for name in sorted(fields) if name.endswith("dropout") and name != "module_dropout"), None)


def arguments(kind: Any, settings: Any) -> dict[str, Any]:
    """Return the keyword arguments of a class of PEFT's configurations for `AdapterSettings`.

    Settings that the class does not have are left out, and its other settings have PEFT's defaults.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    given = {
        "r": settings.r, "lora_alpha": settings.alpha, "alpha": settings.alpha, **settings.shared,
        "rank_pattern": dict(settings.rank_pattern), "alpha_pattern": dict(settings.alpha_pattern),
    }  # fmt: skip
    dropout = {name: settings.dropout for name in (dropout_in(fields),) if name}
    return {name: value for name, value in given.items() if name in fields} | dropout


def configuration(name: str, settings: Any, model: nn.Module) -> PeftConfig:
    """Return the configuration of a method that a user brings, for `AdapterSettings` and a model without adapters.

    A function is called as `function(model, settings)`. On a model without weights (on the meta device, as in checks
    before training), what it creates has no weights either. Raises `InvalidArgument` for any error of the method, and
    if the method returns neither PEFT's configuration of layers nor a dict of updates by layer.
    """
    import torch
    from peft import PeftConfig

    from .updates import config_of_updates

    found, flag = find(name), flag_of(name)
    empty = any(value.is_meta for value in model.parameters())
    with refused_as(flag, FIX_ON_META if empty else FIX), torch.device("meta") if empty else contextlib.nullcontext():
        result = found(**arguments(found, settings)) if is_configuration(found) else found(model, settings)
        if isinstance(result, dict):
            return config_of_updates(result, model, settings)
    if not isinstance(result, PeftConfig):
        problem = f"it returned {type(result).__name__}, neither a PEFT configuration nor a dict of updates by layer"
        raise InvalidArgument(flag, problem, FIX)
    if not hasattr(result, "target_modules"):
        raise InvalidArgument(flag, f"{type(result).__name__} adapts no layers", "give the configuration of a tuner")
    return result
