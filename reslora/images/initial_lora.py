"""Create a method's adapters, from the options or from a LoRA file."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import PeftConfig
from torch import nn

from ..content_hash import files_mark
from ..errors import InvalidArgument
from ..export import PEFT_FILE, lora_config
from ..methods.adapters import attach, check_usable
from ..methods.patterns import FIELDS, entries, spell_out
from ..methods.registry import METHODS, AdapterSettings, adapter_config, refusing_own
from ..options.contradictions import refuse_other_than_lora
from ..options.images import MethodOptions, Options, TrainingOptions
from ..training.trained import Trained
from .context import ImageContext
from .generators import derive
from .model.families.base import Part
from .model.loading import Model
from .model.lora_files.names import names_of
from .model.lora_files.numbered import named
from .model.lora_files.reading import read_content, read_parts
from .model.start import Start


def read_start(file: str, base: str, model: Model, option: str = "init_lora") -> Start:
    """Read the LoRA of --init_lora, or of another option, in any tool's format.

    Raises `InvalidArgument` if the file has layers of a model other than the denoiser, or a layer of --init_lora has
    alpha 0.
    """
    path, flag = Path(file), f"--{option} {file}"
    names = names_of(model.family, model.denoiser_config())
    content = named(read_content(path, flag), names)
    parts = read_parts(content, names)
    layers = parts.pop(model.family.denoiser, {})
    if parts or not layers:
        use = "can start from a LoRA" if option == "init_lora" else "can have an assistant"
        problem = f"it has layers of {', '.join(parts)}, and only the denoiser {use}"
        fix = _how_to_part(file, base, model, option) if layers else "give a LoRA of the denoiser"
        raise InvalidArgument(flag, problem, fix)
    zero = [name for name, factors in layers.items() if factors.scale == 0]
    if zero and option == "init_lora":
        raise InvalidArgument(flag, f"{zero[0]} has alpha 0, so that it cannot be trained", "give another LoRA")
    return Start(layers, expression_of(layers, names.modules), f"content {files_mark(content.files)}")


def _how_to_part(file: str, base: str, model: Model, option: str) -> str:
    """Return advice on how to get a file with only the denoiser's layers.

    `reslora-convert --to peft` writes a separate file for the denoiser and for each text encoder.
    """
    whose = f"--family {model.family.name}" if Path(base).is_file() else f"--base {shlex.quote(base)}"
    command = f"reslora-convert {shlex.quote(file)} FOLDER --to peft {whose}"
    return f"run {command}, and give --{option} FOLDER/{PEFT_FILE}"


def with_start(options: Options, start: Start) -> Options:
    """Return the options with the targets and the most frequent rank and alpha of the LoRA `start`.

    Raises `InvalidArgument` if the options have rank or alpha patterns, or other targets, another rank or alpha.
    """
    own = lora_config(start.layers)
    found = {"rank": own.r, "lora_alpha": own.lora_alpha, "target_modules": [start.targets]}
    refuse_other_than_lora(options.flat(), found)
    return options.replace(**found)


def expression_of(names: Iterable[str], every: Iterable[str]) -> str:
    """Return a regular expression that matches the complete names in `names`, and no others out of `every`.

    The expression matches any number instead of a specific one where possible, which makes it shorter.
    """
    wanted, found = set(names), []
    others = set(every) - wanted
    for name in sorted(wanted):
        any_number = re.sub(r"\d+", r"\\d+", re.escape(name))
        found.append(re.escape(name) if any(re.fullmatch(any_number, other) for other in others) else any_number)
    return f"(?:{'|'.join(dict.fromkeys(found))})"


def add_adapters(trained: Trained, method: str, steps: int, context: ImageContext) -> None:
    """Add the method's adapter to every trained model.

    With --init_lora, the adapter of the denoiser starts from that LoRA.
    """
    options, start = context.options, context.start
    for part in (None, *context.encoders):
        model = trained.parts[part.name] if part else trained.denoiser
        targets = part.targets_in(model) if part else None
        seed_adapter(options.training, part)  # a user's own method may create tensors with random values
        config = config_of(method, options.adapter, steps, targets, None if part else start, model)
        add_adapter(model, method, options.adapter, options.training, config, part)
    if start is not None:
        start.copy_to(trained.denoiser)


def add_adapter(
    model: nn.Module,
    method: str,
    adapter: MethodOptions,
    training: TrainingOptions,
    config: PeftConfig,
    part: Part | None = None,
) -> None:
    """Add the method's adapter to a model in place, initialized from the seed.

    `part`: the name of the text encoder; None for the denoiser.
    """
    if part is None and (adapter.rank_pattern or adapter.alpha_pattern):
        spell_out(model, config)
    seed_adapter(training, part)
    with refusing_own(method):
        attach(model, config, adapter.reslora_config if METHODS[method].shortcuts else None, in_place=True)
        if METHODS[method].own:
            check_usable(model)
    cast_training_params(model, dtype=torch.float32)


def seed_adapter(training: TrainingOptions, part: Part | None) -> None:
    """Seed torch for the initial values of a part's adapter."""
    torch.manual_seed(derive(training.seed, "adapter", *([part.name] if part else [])))


def config_of(
    method: str,
    options: MethodOptions,
    total_steps: int,
    targets: list[str] | str | None = None,
    start: Start | None = None,
    model: nn.Module | None = None,
) -> PeftConfig:
    """Return PEFT's configuration of the method's adapter. `targets` are by default those of the denoiser.

    With `start`, each layer has the rank and alpha that it has in the initial LoRA. Rank and alpha patterns of the
    options apply only to the denoiser. `model` is the model that gets the adapter; only a user's own method reads it.
    """
    patterns: dict[str, Any] = {} if targets else {name: entries(name, getattr(options, name)) for name in FIELDS}
    settings = AdapterSettings(
        r=options.rank, alpha=options.lora_alpha, dropout=options.lora_dropout,
        targets=targets or targets_of(options.target_modules), total_steps=total_steps,
        init_lora_weights=options.initialization_of(method), **patterns,
    )  # fmt: skip
    config = adapter_config(method, settings, model)
    if start is not None:
        start.configure(config)
    return config


def targets_of(names: list[str]) -> list[str] | str:
    """Return PEFT's `target_modules`: a list of name suffixes, or one regular expression for complete names."""
    return names[0] if len(names) == 1 and re.search(r"[\\^$*+?()\[\]{}|]", names[0]) else names
