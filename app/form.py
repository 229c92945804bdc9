"""The trainer's flags as a form: which a page may set, how they are called, and what to begin with. No gradio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from reslora.methods.registry import METHODS
from reslora.options.images import Options
from reslora.options.optimizers import OPTIMIZERS
from reslora.options.option import SAME, Option, in_words

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
"""Options that take words which name no file, no model and no code."""
OF_CLASS_IMAGES = ("class_prompt", "num_class_images", "prior_loss_weight")
"""Options that nothing reads without a folder of class images, which a page may not name."""
OF_BUNDLED = {name for name, option in Options.table().items() if option.bundled_flow is not SAME}
"""Options of which a bundled pipeline has defaults of its own."""
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


def known() -> dict[str, Option]:
    """The trainer's options that a page may set."""
    return {option.name: option for group in groups().values() for option in group}


def groups(without: Sequence[str] = ()) -> dict[str, list[Option]]:
    """The options that a page may set, but for some, by --help's groups: a page names no file or code of the server."""
    found: dict[str, list[Option]] = {}
    for name, option in Options.table().items():
        if is_safe(option) and name not in without:
            found.setdefault(Options.titles[option.group], []).append(option)
    return found


def is_safe(option: Option) -> bool:
    """Whether any value of an option may come from a browser: a switch, a choice, a number, or harmless words."""
    if option.name in NEVER:
        return False
    is_number = option.parse is not str and option.name != "validation_prompt_options"
    listed = bool(option.choices) or option.name in ("optimizer", "validation_prompt", *TEXTS)
    return listed or is_number or option.is_switch


def choices(option: Option) -> list[str]:
    """What may be chosen; empty where anything may be written."""
    return list(OPTIMIZERS) if option.name == "optimizer" else list(option.choices)


def label(option: Option) -> str:
    """An option's name for people."""
    return LABELS.get(option.name) or option.name.replace("_", " ").capitalize()


def info(option: Option) -> str:
    """What an option does, and its name; its default stands in the box."""
    return f"{option.help[:1].upper()}{option.help[1:]} · {option.flag}"


def default(option: Option, model: str = "") -> str:
    """What is taken where a box is left empty, in words; a bundled model may have its own."""
    otherwise = option.otherwise.partition(";")[0]
    if option.bundled is not SAME:
        is_flow = model in PIPELINES and PIPELINES[model].name == "pipeline-flow"
        bundled = in_words(option.bundled_flow if is_flow and option.bundled_flow is not SAME else option.bundled)
        return bundled if option.by_family else f"{bundled} (another model: {otherwise})"
    return in_box(option.fixed_default) if option.fixed_default is not None else otherwise.removeprefix("none")


def in_box(value: object, between: str = " ") -> str:
    """A value as one would write it."""
    if value is None:
        return ""
    return between.join(map(str, value)) if isinstance(value, list) else str(value)


def as_flag(option: Option, value: object) -> str:
    """An option with its value, as one would write it in a command."""
    if option.is_switch:
        return f"--{'' if value else 'no-'}{option.name}"
    return f"{option.flag} {in_box(value)[:80]}" if in_box(value) else f"no {option.flag}"


def wires(methods: Iterable[str]) -> bool:
    """Whether any of the methods reads what is set for ResLoRA's shortcuts."""
    return any(METHODS[name].reads_shortcut_flags for name in methods if name in METHODS)


def values_of(settings: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """The form's values for these settings: of each option its value, else what an untouched form has."""
    return [widget_value(option, settings.get(name)) for name, option in chosen(names).items()]


def chosen(names: Sequence[str]) -> dict[str, Option]:
    """The options of these names, in their order."""
    found = known()
    return {name: found[name] for name in names}


def widget_value(option: Option, value: object) -> object:
    """A value as the option's widget has it; what does not fit one is as if it were not given."""
    if option.is_switch:
        return bool(option.default if not isinstance(value, bool) else value)
    if option.name == "method":
        found = [one for one in value if one in choices(option)] if isinstance(value, list) else []
        return found or list(option.bundled)
    if choices(option):
        return value if value in choices(option) else option.fixed_default or ""
    if isinstance(value, bool | dict) or value is None:
        return ""
    if option.name == "validation_prompt":
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
