"""Select the values of an earlier run's config.json that apply together with the options on the command line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import speaks
from ..methods.registry import METHODS
from ..options.images import Options
from ..options.optimizers import named
from ..options.option import Given
from ..options.values import listed
from .experiment.requirements import OF_EXPERIMENTS, OF_RUNS

OF_SHORTCUTS = [name for name, option in Options.table().items() if option.implies and option.read_by]
"""Options that are used only by methods with shortcuts and by the controls of these methods."""


def of_this_run(values: dict[str, Any], given: Given, path: Path) -> dict[str, Any]:
    """Return the values that apply together with the `given` options of the command line; print the ignored options."""
    now, where = {**values, **given}, f"--config {path}"
    checkpoint = values.get("resume_from_checkpoint", "latest")
    if checkpoint != "latest":
        values.pop("resume_from_checkpoint")
        if "resume_from_checkpoint" not in given and speaks():
            left_out = "is ignored: that run resumed from it; give the option to resume this run from it too"
            print(f"{where}: --resume_from_checkpoint {checkpoint} {left_out}", flush=True)
    several = any(len(option.several(now.get(name)) or ()) > 1 for name, option in Options.table().items())
    of_others = list(OF_RUNS if several else OF_EXPERIMENTS)
    if not several and not now.get("save_best"):  # used only by experiments and --save_best
        of_others.append("average_checkpoints")
    table = Options.table()
    set_there = [name for name in of_others if values.get(name) and values[name] != table[name].fixed_default]
    if (told := [name for name in set_there if name not in given]) and speaks():
        kind = "an experiment" if several else "not an experiment"
        print(f"{where}: --{', --'.join(told)} ignored, because this is {kind}", flush=True)
    gone = {*of_others, *_of_other_methods(now), *_of_other_optimizer(values, given)}
    if now.get("validation_split") == 0:
        gone.add("validation_noises")
    return {name: value for name, value in values.items() if name not in gone}


def _of_other_methods(now: Given) -> Iterable[str]:
    """Return the options that a new run ignores because none of its methods has shortcuts.

    A resumed run ignores no option, because it compares all values with those of the earlier run.
    """
    methods = [METHODS[name] for name in now.get("method", ())]
    if not methods or now.get("resume_from_checkpoint") or any(method.reads_shortcut for method in methods):
        return ()
    return OF_SHORTCUTS


def _of_other_optimizer(values: Given, given: Given) -> Iterable[str]:
    """Return the options to ignore because the command line gives another optimizer.

    The ignored options include the learning rates if the two optimizers have different default learning rates.
    """
    if not given.keys() & {"optimizer", "use_8bit_adam"}:
        return ()
    before, *others = map(named, listed(values.get("optimizer", "adamw")))  # several if the optimizer varies
    now = named(next(iter(listed(given.get("optimizer"))), "adamw8bit" if given.get("use_8bit_adam") else "adamw"))
    known = {optimizer.path for optimizer in (before, *others)}
    gone = ["optimizer", "use_8bit_adam"] + ["optimizer_args"] * (now.path not in known)
    other_rate = now.path != before.path and now.learning_rate != before.learning_rate
    return [*gone, "learning_rate", "text_encoder_lr"] if other_rate else gone
