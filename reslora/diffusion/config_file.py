"""Flags from a TOML file that somebody wrote, or from a run's own config.json, where defaults are filled in."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import InvalidArgument, first_line, refused_as, speaks
from ..common.methods import METHODS, SHORTCUT_FLAGS
from ..common.parser import did_you_mean
from . import foreign
from .arguments import is_experiment
from .experiment.checks import OF_EXPERIMENTS, OF_RUNS
from .optimizers import named

# A run's config.json holds both of these; whoever names one on the command line means the other no longer.
GIVES_WAY_TO = {
    "max_train_steps": "num_train_epochs", "num_train_epochs": "max_train_steps", "lora_alpha": "rank",
    "validation_steps": "validation_epochs", "train_data_dir": "dataset_name", "dataset_name": "train_data_dir",
    "dataset_config_name": "train_data_dir", "validation_prompt_options": "validation_prompt",
}  # fmt: skip


def config_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> dict:
    """The values of a TOML file or a run's config.json, checked as the command line's are; `given` are on that one."""
    path = Path(args.config)
    try:
        text = path.read_text(encoding="utf-8-sig")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({first_line(error)})"
        raise InvalidArgument(f"--config {path}", problem, "give a TOML file or a run's config.json") from None
    if not isinstance(table, dict):
        raise InvalidArgument(f"--config {path}", "is not a table of flags", "give a TOML file or a run's config.json")
    for name, value in table.items():
        if any(isinstance(each, dict) for each in (value if isinstance(value, list) else [value])):
            raise InvalidArgument(f"--config {path}", f"{name} is a table", "write all flags at the top level")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if told := foreign.in_words(f"--{name}" for name in table):
        raise InvalidArgument(f"--config {path}", *told.split("; ", 1))
    values = {}
    for name, value in table.items():
        if name not in actions:
            problem = f"{name} is not a flag of train_sd.py{did_you_mean(name, actions)}"
            raise InvalidArgument(f"--config {path}", problem, "rename or remove it")
        # In TOML somebody wrote the alpha; a run's own may have come from its rank.
        resolved = path.suffix == ".json" or name != "lora_alpha"
        if value is not None and value != [] and not (resolved and GIVES_WAY_TO.get(name) in given):
            values[name] = _checked(actions[name], name, value, path)
    return without_what_changes(values, args, given) if path.suffix == ".json" else values


def without_what_changes(values: dict, args: argparse.Namespace, given: set[str]) -> dict:
    """A run's settings but for those that mean nothing beside the flags that are `given`; what is of note is said."""
    now, where = values | {name: getattr(args, name) for name in given}, f"--config {args.config}"
    checkpoint = values.get("resume_from_checkpoint", "latest")
    if checkpoint != "latest":
        values.pop("resume_from_checkpoint")
        if "resume_from_checkpoint" not in given and speaks():
            left_out = "is left out: that run went on from there, and another one starts afresh unless it is given"
            print(f"{where}: --resume_from_checkpoint {checkpoint} {left_out}", flush=True)
    several = is_experiment(now)
    of_others = OF_RUNS if several else OF_EXPERIMENTS
    if (told := [name for name in of_others if values.get(name) and name not in given]) and speaks():
        kind = "an experiment" if several else "no experiment"
        print(f"{where}: without --{', --'.join(told)}, as this is {kind}", flush=True)
    gone = {*of_others, *_of_other_methods(now), *_of_other_optimizer(values, args, given)}
    if now.get("validation_split") == 0:
        gone.add("validation_noises")
    return {name: value for name, value in values.items() if name not in gone}


def _of_other_methods(now: dict) -> Iterable[str]:
    """What a new run's methods do not read; one that goes on is compared by it."""
    methods = [METHODS[name] for name in now.get("method", ())]
    if not methods or now.get("resume_from_checkpoint") or any(method.reads_shortcut_flags for method in methods):
        return ()
    return SHORTCUT_FLAGS


def _of_other_optimizer(values: dict, args: argparse.Namespace, given: set[str]) -> Iterable[str]:
    """What was of the optimizer, where the command line names another; its rate too, where either has its own."""
    if not given & {"optimizer", "use_8bit_adam"}:
        return ()
    before = named(values.get("optimizer", "adamw"))
    now = named(args.optimizer or ("adamw8bit" if args.use_8bit_adam else "adamw"))
    gone = ["optimizer", "use_8bit_adam"] + ["optimizer_args"] * (now.path != before.path)
    other_rate = now.path != before.path and now.learning_rate != before.learning_rate
    return [*gone, "learning_rate", "text_encoder_lr"] if other_rate else gone


def _checked(action: argparse.Action, name: str, value: object, path: Path) -> object:
    """A configured value as argparse would have it from the command line."""
    where, switch = f"--config {path}", isinstance(action, argparse.BooleanOptionalAction)
    if isinstance(value, list) and action.nargs != "+":
        raise InvalidArgument(where, f"{name} = {value} is a list", "give one value")
    if isinstance(value, bool) != switch:
        raise InvalidArgument(where, f"{name} = {value}", "give true or false" if switch else "give a value")
    if switch:
        return value
    items = []
    for item in value if isinstance(value, list) else [value]:
        parse: Any = action.type or str
        with refused_as(f"{where}, {name}", "correct it", (argparse.ArgumentTypeError, ValueError)):
            item = parse(str(item))
        if action.choices and item not in action.choices:
            raise InvalidArgument(
                f"{where}, {name}", f"{item!r} is not a choice", f"give one of {list(action.choices)}"
            )
        items.append(item)
    return items if action.nargs == "+" else items[0]
