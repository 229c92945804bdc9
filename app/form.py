"""Describe the form of the trainer's options: which options the page may set, labels, defaults and presets.

This module does not import Gradio.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from reslora.images.settings import with_defaults
from reslora.methods.registry import METHODS
from reslora.options.images import Options
from reslora.options.optimizers import OPTIMIZERS
from reslora.options.option import SAME, Option
from reslora.options.values import listed

from .bases import PIPELINES, bundled
from .library import VARYING
from .runs import NO_CONFIG, Run, RunError

LABELS = {
    "method": "Methods",
    "seed": "Seeds",
    "learning_rate": "Learning rates",
    "max_train_steps": "Steps",
    "train_batch_size": "Batch size",
    "pre_num": "Preceding blocks used",
    "head": "First block of a chain",
    "validation_steps": "Steps between samples",
    "checkpointing_steps": "Steps between checkpoints",
    "validation_prompt": "Sample prompts",
    "test_split": "Test split",
    "select_split": "Selection split",
    "experiment_minutes": "Time limit (minutes)",
    "extend_rates": "Extend the range of learning rates",
    "arms_at_once": "Runs at the same time",
    "gpus_per_run": "GPUs per run",
    "against": "Compare with",
}
"""Labels of options whose name alone would be unclear."""
HELP = {
    "method": "Several are trained one after the other, and see the same images in the same order",
    "learning_rate": "Several, separated by spaces, make an experiment",
    "seed": "Three or more seeds show whether a difference is chance",
    "rank": "A higher rank learns more detail and needs more memory",
    "max_train_steps": "Optimizer steps of each run",
    "train_batch_size": "Images per step; fewer need less memory",
    "resolution": "Side of the training images in pixels",
    "validation_prompt": "One per line; images are generated from them during training",
    "validation_steps": "Steps between two sets of samples",
}
"""Help for the options that are always visible; it is shorter than the help of the trainer's command line."""
MODEL = "pretrained_model_name_or_path"
FIRST = ("lora", "reslora")
"""Names of the methods that are always visible."""
FOLLOWING = [name for name, option in Options.table().items() if option.bundled is not SAME and name != "method"]
FOLLOWING += ["max_train_steps", "select_split", "test_split"]
"""Options whose default depends on other options."""
TEXTS = (
    "caption_prefix", "caption_suffix", "target_modules", "rank_pattern", "alpha_pattern", "lr_step_rules", "reference",
)  # fmt: skip
"""Text options that are safe to set from a browser, because their values are not paths, models or code."""
NEVER = (
    "plan", "local_rank", "push_to_hub", "dataloader_num_workers",
    "class_prompt", "num_class_images", "prior_loss_weight",  # have an effect only with --class_data_dir, a path
)  # fmt: skip
"""Options that the page does not set."""
UNSET, LONGEST_DEFAULT = "default", 15
"""What a box shows instead of a default that has more characters than fit; the help then names the default."""
GROUP = "options-%d"
"""Name of the page's element of a group of options, by the number of the group."""
LARGE = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
"""Settings of large models, as in the commands of diffusers' examples; their other defaults follow from the family."""
PRESETS: dict[str, dict[str, object]] = {
    "the defaults": {},
    "a quick test": {"max_train_steps": 50, "validation_steps": 25, "checkpointing_steps": 50},
    "an experiment: LoRA or ResLoRA": {
        "method": ["lora", "reslora"], "learning_rate": [1e-4, 3e-4, 1e-3], "seed": [0, 1, 2],
    },
    "an experiment: ResLoRA with controls": {
        "method": ["lora", "reslora", "lora_x2", "lora_matched"], "learning_rate": [1e-4, 3e-4, 1e-3],
        "seed": [0, 1, 2],
    },
    "little memory": {"train_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True},
    "photographs of one subject": {
        "train_batch_size": 2, "use_aspect_ratio_buckets": True, "caption_dropout": 0.05, "validation_split": 0.1,
    },
    "Stable Diffusion 1.5": {MODEL: "stable-diffusion-v1-5/stable-diffusion-v1-5", "train_batch_size": 4},
    "SDXL": {MODEL: "stabilityai/stable-diffusion-xl-base-1.0", **LARGE},
    "Stable Diffusion 3.5 medium": {MODEL: "stabilityai/stable-diffusion-3.5-medium", **LARGE},
    "Flux.1 dev": {MODEL: "black-forest-labs/FLUX.1-dev", **LARGE},
    "FLUX.2 klein": {MODEL: "black-forest-labs/FLUX.2-klein-base-4B", **LARGE},
    "Z-Image": {MODEL: "Tongyi-MAI/Z-Image", **LARGE},
    "Qwen-Image": {MODEL: "Qwen/Qwen-Image", **LARGE},
}  # fmt: skip
"""Initial settings of the form; options that are not listed have the trainer's default."""


def known() -> dict[str, Option]:
    """Return the options that the page may set, by name."""
    return {option.name: option for group in groups().values() for option in group}


def groups(without: Sequence[str] = ()) -> dict[str, list[Option]]:
    """Return the options that the page may set, except those in `without`, by the title of their group in `--help`."""
    found: dict[str, list[Option]] = {}
    for name, option in Options.table().items():
        if is_safe(option) and name not in without:
            found.setdefault(Options.titles[option.group], []).append(option)
    return found


def index(without: Sequence[str]) -> list[dict[str, str]]:
    """Return the texts that the search of options compares: name, label, help and group of each option.

    `without`: options that are in no group.
    """
    found = [("", known()[name]) for name in without]
    found += [(GROUP % number, one) for number, group in enumerate(groups(without).values()) for one in group]
    return [
        {
            "name": one.name,
            "label": label(one),
            "group": group,
            "text": f"{one.name} {label(one)} {info(one)} {one.help}".lower(),
        }
        for group, one in found
    ]


def with_one_value(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with a value instead of a list for each option whose box takes one value.

    Raises `RunError` if such an option has several values.
    """
    found = dict(settings)
    for name, option in known().items():
        if option.can_vary and not option.varies and (values := option.several(settings.get(name))):
            if len(values) > 1:
                raise RunError(
                    f"{name} has several values, which the form cannot show: use --vary on the command line."
                )
            found[name] = values[0]
    return found


def is_safe(option: Option) -> bool:
    """Return whether the page may set an option, because no value from a browser can do harm.

    Safe options are switches, choices, numbers and the texts in `TEXTS`."""
    if option.name in NEVER:
        return False
    is_number = option.parse is not str and option.name != "validation_prompt_options"
    listed = bool(option.choices) or option.name in ("optimizer", "validation_prompt", *TEXTS)
    return listed or is_number or option.is_switch


def choices(option: Option) -> list[str]:
    """Return the values that an option allows; empty if it allows any text."""
    return list(OPTIMIZERS) if option.name == "optimizer" else list(option.choices)


def label(option: Option) -> str:
    """Return an option's label in the form."""
    return LABELS.get(option.name) or option.name.replace("_", " ").capitalize()


def info(option: Option) -> str:
    """Return the help text below an option's label."""
    text = HELP.get(option.name, option.help)
    if option.name not in HELP and in_empty_box(option) == UNSET:
        text = f"{text}. Default: {option.otherwise.partition(';')[0]}"
    return without_flags(f"{text[:1].upper()}{text[1:]}")


def without_flags(text: str) -> str:
    """Return a text of the trainer with the labels of the form in place of its options."""
    table = Options.table()
    return re.sub(r"--(?:no-)?(\w+)", lambda found: label(table[found[1]]) if found[1] in table else found[0], text)


def in_empty_box(option: Option) -> str:
    """Return what the box of an option shows while it is empty: the default, or `UNSET` if the default is too long.

    A list shows `UNSET` for any default, because it is as narrow as the boxes and has an arrow."""
    default = placeholder(option)
    return UNSET if default and (choices(option) or len(default) > LONGEST_DEFAULT) else default


def placeholder(option: Option) -> str:
    """Return the placeholder of an option's text box: what the trainer does if the option is not given."""
    return "" if option.fixed_default is not None else option.otherwise.partition(";")[0].removeprefix("none")


def defaults(given: Mapping[str, object]) -> dict[str, object]:
    """Return the default of every option, as a value of the form, by name.

    The defaults depend on the settings in `given`: the model, the optimizer, and whether the settings make an
    experiment. Defaults that are only known when training starts are empty.
    """
    model = given.get(MODEL)
    named = {MODEL: str(PIPELINES.get(bundled(model), model))} if isinstance(model, str) and model else {}
    table = Options.table()
    others = {
        name: value for name, value in given.items() if name in VARYING and table[name].several(value) is not None
    }
    others |= {name: value for name, value in given.items() if name == "optimizer" and isinstance(value, str)}
    without = with_defaults(named)
    found = with_defaults(named | others) | {name: without[name] for name in others}
    for name, option in known().items():  # a number such as the rank is known, though the model's family fills it in
        if found[name] is None and placeholder(option).isdigit():
            found[name] = placeholder(option)
    return {name: widget_value(option, found[name]) for name, option in known().items()}


def methods(first: bool) -> list[tuple[str, str]]:
    """Return labels and names of the methods in `FIRST` or, if not `first`, of all others."""
    found = [method for name, method in METHODS.items() if (name in FIRST) == first]
    return [(f"{method.title}: {method.help}", method.name) for method in found]


def in_box(value: object, between: str = " ") -> str:
    """Return a value as text for a text box; the items of a list are joined by `between`, and None is empty."""
    if value is None:
        return ""
    return between.join(map(str, value)) if isinstance(value, list) else str(value)


def wires(methods: Iterable[str]) -> bool:
    """Return whether any of these methods uses the options of ResLoRA's shortcuts."""
    return any(METHODS[name].reads_shortcut for name in methods if str(name) in METHODS)


def values_of(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the form's value of each option: the value in `settings`, else the default."""
    own, options = with_one_value(settings), known()
    return defaults(settings) | {name: widget_value(options[name], own[name]) for name in own if name in options}


def widget_value(option: Option, value: object) -> object:
    """Convert an option's value to a value of its Gradio component; an invalid value becomes the default."""
    if option.is_switch:
        return value if isinstance(value, bool) else bool(option.default or option.fixed_default)
    if choices(option) and (option.varies or option.name == "method"):
        found = [one for one in listed(value) if isinstance(one, str) and one in choices(option)]
        return found or listed(option.bundled if option.name == "method" else option.fixed_default)
    if choices(option):
        return value if value in choices(option) else option.fixed_default or ""
    if isinstance(value, bool | dict) or value is None:
        return ""
    return in_box(value, "\n" if option.name == "validation_prompt" else " ")


def settings_of(name: str, runs: Mapping[str, Run]) -> dict:
    """Return the settings of the preset, run or experiment with this name.

    Raises `RunError` if none has this name, or if the run's config.json is damaged.
    """
    if name in PRESETS:
        return PRESETS[name]
    if name not in runs:
        raise RunError("There is no run or preset of that name; choose one from the list.")
    if runs[name].unreadable:
        raise RunError(f"{name}: {NO_CONFIG}; choose another run.")
    return runs[name].config
