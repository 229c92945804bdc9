"""Optimizers by short name or by the path of their class.

torch is imported only to check a class, so that `--help` appears at once.
"""

import ast
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import require_package
from ..errors import InvalidArgument, first_line


@dataclass(frozen=True)
class Named:
    """An optimizer with a short name."""

    path: str
    """Path of its class."""
    package: str
    """Package to install for it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments whose values differ from the defaults of the optimizer's authors."""
    learning_rate: float | None = None
    """Learning rate if none is given."""


OPTIMIZERS = {
    "adamw": Named("torch.optim.AdamW", "torch"),
    "adamw8bit": Named("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    # Prodigy estimates the learning rate, and multiplies the estimate by this value.
    "prodigy": Named("prodigyopt.Prodigy", "prodigyopt", learning_rate=1.0),
    # By default the optimizer computes its own learning rate and rejects a given one.
    "adafactor": Named(
        "transformers.optimization.Adafactor", "transformers", {"relative_step": False, "scale_parameter": False}
    ),
    "lion": Named("lion_pytorch.Lion", "lion-pytorch"),
    "schedulefree": Named("schedulefree.AdamWScheduleFree", "schedulefree"),
}
CHOICE = f"give one of {', '.join(OPTIMIZERS)}"
ADAMS = ("adamw", "adamw8bit")
"""The optimizers to which --adam_... applies."""


def named(optimizer: str) -> Named:
    """Return the optimizer of a short name, or of a class path."""
    return OPTIMIZERS.get(optimizer) or Named(optimizer, optimizer.partition(".")[0])


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `key=value` words; a value is a Python literal, else a string.

    Raises `InvalidArgument` for a word of another form.
    """
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
    """Raise `InvalidArgument` if the optimizer that `flag` names is not installed, or has invalid arguments.

    Invalid are arguments of a wrong form, and `lr`, because --learning_rate sets it.
    """
    row = named(optimizer)
    if "." not in row.path:
        raise InvalidArgument(flag, "no such optimizer", f"{CHOICE}, or package.Class")
    require_package(flag, row.package, row.path.partition(".")[0])
    if "lr" in (given := options_of(words)):
        raise InvalidArgument(f"--optimizer_args lr={given['lr']}", "--learning_rate sets it", "leave it out")


def class_of(optimizer: str) -> type:
    """Return the class of an optimizer.

    Raises `InvalidArgument` if the class does not exist or is not an optimizer.
    """
    module, _, name = named(optimizer).path.rpartition(".")
    flag = f"--optimizer {optimizer}"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(flag, first_line(error), f"{CHOICE}, or package.Class") from None
    from torch.optim import Optimizer

    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise InvalidArgument(flag, "is no class of torch's optimizers", CHOICE)
    return found
