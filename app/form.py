"""Describe the trainer's options as a form: which ones the page may set, labels, defaults and presets. No Gradio."""

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
    "compare_at": "Compare at equal",
    "claim": "Claimed to be better",
    "claim_margin": "By more than percent",
}
"""Labels that are clearer than the option's name."""
TEXTS = (
    "caption_prefix", "caption_suffix", "target_modules", "rank_pattern", "alpha_pattern", "lr_step_rules", "reference",
    "claim",
)  # fmt: skip
"""Text options that name no file, model or code."""
OF_CLASS_IMAGES = ("class_prompt", "num_class_images", "prior_loss_weight")
"""Options that only apply with a folder of class images, which the page must not name."""
OF_BUNDLED = {name for name, option in Options.table().items() if option.bundled_flow is not SAME}
"""Options for which a bundled pipeline has its own default."""
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
"""Initial settings of the form; options that are not listed have the trainer's default."""


def known() -> dict[str, Option]:
    """Return the options that the page may set, by name."""
    return {option.name: option for group in groups().values() for option in group}


def groups(without: Sequence[str] = ()) -> dict[str, list[Option]]:
    """Return the options that the page may set, except `without`, by the groups of `--help`.

    Options that name a file or code of the server are excluded.
    """
    found: dict[str, list[Option]] = {}
    for name, option in Options.table().items():
        if is_safe(option) and name not in without:
            found.setdefault(Options.titles[option.group], []).append(option)
    return found


def is_safe(option: Option) -> bool:
    """Return whether an option is harmless with any value from a browser: a switch, choice, number or safe text."""
    if option.name in NEVER:
        return False
    is_number = option.parse is not str and option.name != "validation_prompt_options"
    listed = bool(option.choices) or option.name in ("optimizer", "validation_prompt", *TEXTS)
    return listed or is_number or option.is_switch


def choices(option: Option) -> list[str]:
    """Return the allowed values of an option; empty if it takes any text."""
    return list(OPTIMIZERS) if option.name == "optimizer" else list(option.choices)


def label(option: Option) -> str:
    """Return the label of an option."""
    return LABELS.get(option.name) or option.name.replace("_", " ").capitalize()


def info(option: Option) -> str:
    """Return the help and name of an option; the default is the placeholder of its text box."""
    return f"{option.help[:1].upper()}{option.help[1:]} · {option.flag}"


def default(option: Option, model: str = "") -> str:
    """Return, as text, the value that an option has if its box is empty; it may depend on the bundled `model`."""
    otherwise = option.otherwise.partition(";")[0]
    if option.bundled is not SAME:
        is_flow = model in PIPELINES and PIPELINES[model].name == "pipeline-flow"
        bundled = in_words(option.bundled_flow if is_flow and option.bundled_flow is not SAME else option.bundled)
        return bundled if option.by_family else f"{bundled} (another model: {otherwise})"
    return in_box(option.fixed_default) if option.fixed_default is not None else otherwise.removeprefix("none")


def in_box(value: object, between: str = " ") -> str:
    """Return a value as text for a text box."""
    if value is None:
        return ""
    return between.join(map(str, value)) if isinstance(value, list) else str(value)


def as_flag(option: Option, value: object) -> str:
    """Return an option with its value as on a command line."""
    if option.is_switch:
        return f"--{'' if value else 'no-'}{option.name}"
    return f"{option.flag} {in_box(value)[:80]}" if in_box(value) else f"no {option.flag}"


def wires(methods: Iterable[str]) -> bool:
    """Return whether any of the methods reads the options of ResLoRA's shortcuts."""
    return any(METHODS[name].reads_shortcut_flags for name in methods if name in METHODS)


def values_of(settings: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """Return the form's value for each named option: its value in `settings`, else the form's default."""
    return [widget_value(option, settings.get(name)) for name, option in chosen(names).items()]


def chosen(names: Sequence[str]) -> dict[str, Option]:
    """Return the options of these names, in this order."""
    found = known()
    return {name: found[name] for name in names}


def widget_value(option: Option, value: object) -> object:
    """Return the value for the option's widget; an invalid value becomes the default."""
    if option.is_switch:
        return bool(option.default if not isinstance(value, bool) else value)
    if option.name == "method":
        found = [one for one in value if one in choices(option)] if isinstance(value, list) else []
        return found or list(option.bundled)
    if choices(option):
        return value if value in choices(option) else option.fixed_default or ""
    if isinstance(value, bool | dict) or value is None:
        return ""
    return in_box(value, "\n" if option.name == "validation_prompt" else " ")


def settings_of(name: str, runs: Mapping[str, Run]) -> dict:
    """Return the settings of the preset or run of that name.

    Raises `RunError` if there is none, or if the run's config.json is damaged.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name not in runs:
        raise RunError("There is no run of that name to begin with; choose one from the list.")
    if runs[name].unreadable:
        raise RunError(f"{name}: {NO_CONFIG}; begin with another one.")
    return runs[name].config
