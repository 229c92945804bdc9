"""What of a run's own config.json means nothing next to the options that the command line gives."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import speaks
from ..common.flags import listed
from ..common.methods import METHODS
from ..options.images import Options
from ..options.optimizers import named
from ..options.option import Given
from .experiment.checks import OF_EXPERIMENTS, OF_RUNS

OF_SHORTCUTS = [name for name, option in Options.table().items() if option.implies and option.read_by]
"""Options that only methods with shortcuts read, or controls of these."""


def of_this_run(values: dict[str, Any], given: Given, path: Path) -> dict[str, Any]:
    """Return a run's settings but for those that mean nothing next to those `given`; print what is of note."""
    now, where = {**values, **given}, f"--config {path}"
    checkpoint = values.get("resume_from_checkpoint", "latest")
    if checkpoint != "latest":
        values.pop("resume_from_checkpoint")
        if "resume_from_checkpoint" not in given and speaks():
            left_out = "is left out: that run went on from there, and another one starts afresh unless it is given"
            print(f"{where}: --resume_from_checkpoint {checkpoint} {left_out}", flush=True)
    several = any(option.varies and len(listed(now.get(name))) > 1 for name, option in Options.table().items())
    of_others = OF_RUNS if several else OF_EXPERIMENTS
    if (told := [name for name in of_others if values.get(name) and name not in given]) and speaks():
        kind = "an experiment" if several else "no experiment"
        print(f"{where}: without --{', --'.join(told)}, as this is {kind}", flush=True)
    gone = {*of_others, *_of_other_methods(now), *_of_other_optimizer(values, given)}
    if now.get("validation_split") == 0:
        gone.add("validation_noises")
    return {name: value for name, value in values.items() if name not in gone}


def _of_other_methods(now: Given) -> Iterable[str]:
    """Return what a new run's methods do not read; one that resumes is compared by it."""
    methods = [METHODS[name] for name in now.get("method", ())]
    if not methods or now.get("resume_from_checkpoint") or any(method.reads_shortcut_flags for method in methods):
        return ()
    return OF_SHORTCUTS


def _of_other_optimizer(values: Given, given: Given) -> Iterable[str]:
    """Return what was of the optimizer, where the command line names another; its rate too, where either has one."""
    if not given.keys() & {"optimizer", "use_8bit_adam"}:
        return ()
    before = named(values.get("optimizer", "adamw"))
    now = named(given.get("optimizer") or ("adamw8bit" if given.get("use_8bit_adam") else "adamw"))
    gone = ["optimizer", "use_8bit_adam"] + ["optimizer_args"] * (now.path != before.path)
    other_rate = now.path != before.path and now.learning_rate != before.learning_rate
    return [*gone, "learning_rate", "text_encoder_lr"] if other_rate else gone
