"""Optimizers by name or by the path of their class: a row for what people ask for, and nothing for any other."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.checks import require_package
from ..common.errors import InvalidArgument, first_line


@dataclass(frozen=True)
class Named:
    """An optimizer with a short name."""

    path: str
    """Of its class."""
    package: str
    """What is to be installed for it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Where it is not taken as its authors set it."""
    learning_rate: float | None = None
    """What it wants where none is given."""


OPTIMIZERS = {
    "adamw": Named("torch.optim.AdamW", "torch"),
    "adamw8bit": Named("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "prodigy": Named("prodigyopt.Prodigy", "prodigyopt", learning_rate=1.0),  # it finds the rate, and this scales it
    # By itself it would find a rate of its own and refuse ours.
    "adafactor": Named(
        "transformers.optimization.Adafactor", "transformers", {"relative_step": False, "scale_parameter": False}
    ),
    "lion": Named("lion_pytorch.Lion", "lion-pytorch"),
    "schedulefree": Named("schedulefree.AdamWScheduleFree", "schedulefree"),
}
ADAMS = ("adamw", "adamw8bit")
"""Those that the flags --adam_... are for."""


def named(optimizer: str) -> Named:
    """Return the row of a name, or of a class by its path."""
    return OPTIMIZERS.get(optimizer) or Named(optimizer, optimizer.partition(".")[0])


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """What `key=value` words say; a value is read as Python reads it, else it is text."""
    options: dict[str, Any] = {}
    for word in words:
        key, found, value = word.partition("=")
        if not found or not key.isidentifier():
            raise InvalidArgument(f"--optimizer_args {word}", "is not key=value", "give weight_decay=0.01, for example")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def check_installed(optimizer: str, words: Sequence[str], flag: str) -> None:
    """Refuse an optimizer that is not there, by the flag that asks for it, and arguments that are none."""
    row = named(optimizer)
    if "." not in row.path:
        raise InvalidArgument(flag, "no such optimizer", f"give one of {', '.join(OPTIMIZERS)}, or package.Class")
    require_package(flag, row.package, row.path.partition(".")[0])
    options_of(words)


def class_of(optimizer: str) -> type:
    """Return the class of the optimizer; refuses what is none."""
    module, _, name = named(optimizer).path.rpartition(".")
    flag = f"--optimizer {optimizer}"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(
            flag, first_line(error), f"give one of {', '.join(OPTIMIZERS)}, or package.Class"
        ) from None
    from torch.optim import Optimizer

    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise InvalidArgument(flag, "is no class of torch's optimizers", f"give one of {', '.join(OPTIMIZERS)}")
    return found
