"""Presets of --layers: names for the layers of the denoiser that get an adapter, by family."""

import re

import torch
from torch import nn

from ..errors import InvalidArgument
from ..options.images import DEFAULT_RANK
from .initial_lora import expression_of
from .model.families import FAMILIES, load_family
from .model.families.base import Family
from .model.loading import Model
from .model.quantising import block_layers

ALL = "all"


def preset_targets(names: str, targets: list[str] | None, model: Model) -> list[str]:
    """Return the --target_modules of the presets `names` of --layers: one regular expression.

    Raises `InvalidArgument` for a preset that the family or the model does not have, or if `targets` differ from the
    presets.
    """
    family, denoiser, argument = model.family, model.empty_denoiser(), f"--layers {names}"
    found = []
    for name in names.split("+"):
        if name not in (*family.layers, ALL):
            others = [other.name for other in map(load_family, FAMILIES) if name in other.layers]
            problem = f"{family.name} has no preset {name}" + (f", only {', '.join(others)} has" if others else "")
            raise InvalidArgument(argument, problem, f"give {', '.join((*family.layers, ALL))}, or several joined by +")
        found.append(preset(family, denoiser, name))
        if not layers_of(denoiser, found[-1]):
            problem = f"the {family.denoiser} of this {family.name} has no layers of {name}"
            raise InvalidArgument(argument, problem, "give another preset, or --target_modules")
    expression = [found[0] if len(found) == 1 else "|".join(f"(?:{one})" for one in found)]
    if targets not in (None, expression):  # a config.json may contain both options
        raise InvalidArgument(argument, "--target_modules names layers, too", "leave one of them out")
    return expression


def preset(family: Family, denoiser: nn.Module, name: str) -> str:
    """Return the regular expression of a preset; `all` is every linear layer of the denoiser's blocks."""
    if name != ALL:
        return family.layers[name]
    modules = (name for name, _ in denoiser.named_modules() if name)
    return expression_of((name for name, _ in block_layers(denoiser)), modules)


def layers_of(denoiser: nn.Module, expression: str) -> list[nn.Linear]:
    """Return the linear layers whose complete names a regular expression matches."""
    return [
        module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(expression, name)
    ]


def lora_parameters(layers: list[nn.Linear], rank: int) -> int:
    """Return the number of parameters of a LoRA: rank * (inputs + outputs) per layer."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def page() -> str:
    """Return the help of --layers: the presets of each family with the numbers of layers and parameters.

    The parameters are those of a LoRA of the default rank.
    """
    lines = ["--layers NAME, or several joined by +, instead of --target_modules", ""]
    lines.append(f"{'family':<16} {'preset':<10} {'layers':>6}  parameters of a LoRA of rank {DEFAULT_RANK}")
    for family in map(load_family, FAMILIES):
        with torch.device("meta"):
            denoiser = family.denoiser_class.from_config(dict(family.largest or family.published))
        for name in (*family.layers, ALL):
            layers = layers_of(denoiser, preset(family, denoiser, name))
            lines.append(f"{family.name:<16} {name:<10} {len(layers):>6}  {lora_parameters(layers, DEFAULT_RANK):,}")
    lines += [
        "",
        "all: every linear layer of the denoiser's blocks. content, style: the two blocks of B-LoRA.",
        "Several models have one name: the numbers are those of Stable Diffusion 1, Stable Diffusion 3.5 large",
        "and FLUX.2 klein 9B. A run prints those of its own model.",
    ]
    return "\n".join(lines) + "\n"
