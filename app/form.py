"""The trainer's flags as a form: which a page may set, how they are called, and what to begin with. No gradio."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence

from reslora.common.methods import METHODS
from reslora.diffusion.arguments import BUNDLED_DEFAULTS, BY_FAMILY, DEFAULTS, build_parser, in_words
from reslora.diffusion.optimizers import OPTIMIZERS

from .bases import PIPELINES
from .runs import NO_CONFIG, Run, RunError

LABELS = {
    "method": "Methods",
    "max_train_steps": "Steps",
    "train_batch_size": "Batch size",
    "pre_num": "Blocks before it",
    "head": "First block of a chain",
    "validation_steps": "Steps between samples",
    "checkpointing_steps": "Steps between checkpoints",
    "validation_prompt": "Prompts to draw",
    "test_split": "Share to compare by",
    "select_split": "Share to choose by",
    "experiment_minutes": "Minutes at most",
    "extend_rates": "Try further rates",
    "arms_at_once": "Arms at once",
}
"""Where the flag's own words would say less."""
TEXTS = ("caption_prefix", "caption_suffix", "target_modules", "rank_pattern", "alpha_pattern", "lr_step_rules")
"""Flags that take words which name no file, no model and no code."""
OF_CLASS_IMAGES = ("class_prompt", "num_class_images", "prior_loss_weight")
"""Flags that nothing reads without a folder of class images, which a page may not name."""
OF_BUNDLED = {flag for own in BUNDLED_DEFAULTS.values() for flag in own}
"""Flags of which a bundled pipeline has defaults of its own."""
NEVER = ("plan", "local_rank", "push_to_hub", "dataloader_num_workers", *OF_CLASS_IMAGES)
PRESETS: dict[str, dict[str, object]] = {
    "the trainer's defaults": {},
    "a quick look": {"max_train_steps": 50, "validation_steps": 25, "checkpointing_steps": 50},
    "ResLoRA and what would explain it": {"method": ["lora", "lora_x2", "reslora"], "validation_split": 0.1},
    "little memory": {"train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True},
    "photographs of one thing": {
        "train_batch_size": 2, "use_aspect_ratio_buckets": True, "caption_dropout": 0.05, "validation_split": 0.1,
    },
}  # fmt: skip
"""To begin with; what is not in one is the trainer's default."""


def actions() -> dict[str, argparse.Action]:
    """The trainer's own definition of each flag that a page may set."""
    return {action.dest: action for group in groups().values() for action in group}


def groups(without: Sequence[str] = ()) -> dict[str, list[argparse.Action]]:
    """The flags that a page may set, but for some, by --help's groups: a page names no file or code of the server."""
    found = {}
    for group in build_parser()._action_groups:
        safe = [action for action in group._group_actions if is_safe(action) and action.dest not in without]
        found |= {str(group.title): safe} if safe else {}
    return found


def is_safe(action: argparse.Action) -> bool:
    """Whether any value of a flag may come from a browser: a switch, a choice, a number, or harmless words."""
    if action.dest in NEVER or action.dest == "help":
        return False
    is_number = action.type is not None and action.dest != "validation_prompt_options"
    listed = bool(action.choices) or action.dest in ("optimizer", "validation_prompt", *TEXTS)
    return listed or is_number or is_switch(action)


def is_switch(action: argparse.Action) -> bool:
    return isinstance(action, argparse.BooleanOptionalAction)


def choices(action: argparse.Action) -> list[str]:
    """What may be chosen; empty where anything may be written."""
    return list(OPTIMIZERS) if action.dest == "optimizer" else list(action.choices or ())


def label(action: argparse.Action) -> str:
    """A flag's name for people."""
    return LABELS.get(action.dest) or action.dest.replace("_", " ").capitalize()


def info(action: argparse.Action) -> str:
    """What a flag does, and its name; its default stands in the box."""
    text, _, rest = (action.help or "").replace("%%", "%").partition(" (")
    text = f"{text} ({rest}" if action.default is None and rest and action.dest not in DEFAULTS else text
    return f"{text[:1].upper()}{text[1:]} · --{action.dest}"


def default(action: argparse.Action, model: str = "") -> str:
    """What is taken where a box is left empty, in words; a bundled model may have its own."""
    if action.default is not None:
        return in_box(action.default)
    if action.dest in DEFAULTS:
        first, named = DEFAULTS[action.dest]
        own = BUNDLED_DEFAULTS.get(PIPELINES[model].name, {}) if model in PIPELINES else {}
        bundled, other = in_words(own.get(action.dest, first)), in_words(named)
        return bundled if action.dest in BY_FAMILY else f"{bundled} (another model: {other})"
    told = re.search(r"\(default: ([^;)]*)", action.help or "")  # what depends on others is in the help alone
    return told[1] if told else ""


def in_box(value: object, between: str = " ") -> str:
    """A value as one would write it."""
    if value is None:
        return ""
    return between.join(map(str, value)) if isinstance(value, list) else str(value)


def as_flag(action: argparse.Action, value: object) -> str:
    """A flag with its value, as one would write it in a command."""
    if is_switch(action):
        return f"--{'' if value else 'no-'}{action.dest}"
    return f"--{action.dest} {in_box(value)[:80]}" if in_box(value) else f"no --{action.dest}"


def wires(methods: Iterable[str]) -> bool:
    """Whether any of the methods reads what is set for ResLoRA's shortcuts."""
    return any(METHODS[name].reads_shortcut_flags for name in methods if name in METHODS)


def values_of(settings: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """The form's values for these settings: of each flag its value, else what an untouched form has."""
    return [widget_value(action, settings.get(name)) for name, action in chosen(names).items()]


def chosen(names: Sequence[str]) -> dict[str, argparse.Action]:
    """The flags of these names, in their order."""
    known = actions()
    return {name: known[name] for name in names}


def widget_value(action: argparse.Action, value: object) -> object:
    """A value as the flag's widget has it; what does not fit one is as if it were not given."""
    if is_switch(action):
        return bool(action.default if not isinstance(value, bool) else value)
    if action.dest == "method":
        found = [one for one in value if one in choices(action)] if isinstance(value, list) else []
        return found or ["lora", "reslora"]
    if choices(action):
        return value if value in choices(action) else action.default or ""
    if isinstance(value, bool | dict) or value is None:
        return ""
    if action.dest == "validation_prompt":
        return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return in_box(value)


def settings_of(name: str, runs: Mapping[str, Run]) -> dict:
    """The settings of a preset or of a run by its name; `RunError` where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    if name not in runs:
        raise RunError("There is no run of that name to begin with; choose one from the list.")
    if runs[name].unreadable:
        raise RunError(f"{name}: {NO_CONFIG}; begin with another one.")
    return runs[name].config
