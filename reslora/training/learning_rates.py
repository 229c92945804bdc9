"""Learning rates of single layers (--lr_pattern) and of LoRA's B (--loraplus_lr_ratio), as the optimizer's groups."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..methods.patterns import LEARNING_RATES, entries, values_of_layers
from ..options.shared import SharedOptimizerOptions
from .trained import Trained

FACTOR = "lr_factor"  # key in an optimizer's parameter group: what its learning rate is multiplied by
Groups = list[dict[str, Any]]
Parameters = dict[tuple[float, bool], list[nn.Parameter]]
"""Parameters by their factor, and whether they are biases, which have no weight decay, as in transformers."""


def factors_of_layers(options: SharedOptimizerOptions, layers: Iterable[str]) -> dict[str, float]:
    """Return the factor of each layer that --lr_pattern matches; raises the errors of `values_of_layers`."""
    return values_of_layers(LEARNING_RATES, entries(LEARNING_RATES, options.lr_pattern), layers)


def groups_of(trained: Trained, options: SharedOptimizerOptions) -> tuple[Groups, Groups]:
    """Return the optimizer's groups of the denoiser's trained parameters, and those of all text encoders' parameters.

    Embeddings of new tokens are the last group of the text encoders.

    The parameters of a group have the same factor of the learning rate. Groups are in the order in which their factors
    first occur. LoRA+ (Hayou et al., 2024) multiplies the learning rate of B and, as PEFT's `create_loraplus_optimizer`
    does, of vectors such as DoRA's magnitudes.
    """
    prefixes = ["" if part is trained.denoiser else f"{name}." for name, part in trained.parts.items()]
    parts = list(zip(prefixes, trained.parts.values(), strict=True))
    layers = [
        prefix + name
        for prefix, part in parts
        for name, module in part.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    of_layers = factors_of_layers(options, layers)
    found: tuple[Parameters, Parameters] = (defaultdict(list), defaultdict(list))
    for prefix, part in parts:
        groups = found[part is not trained.denoiser]
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                owners = itertools.accumulate((prefix + name).split("."), "{}.{}".format)
                factor = next((of_layers[owner] for owner in owners if owner in of_layers), 1.0)
                is_b = "lora_B" in name or parameter.dim() == 1
                own = factor * options.loraplus_lr_ratio if is_b else factor
                groups[own, name.endswith("bias")].append(parameter)
    # Without factors, the groups are those of checkpoints that were written before there were any.
    keys = [FACTOR] if options.has_factors else []
    denoiser, encoders = (
        [
            {"params": parameters, **dict.fromkeys(keys, factor), **({"weight_decay": 0.0} if biases else {})}
            for (factor, biases), parameters in groups.items()
        ]
        for groups in found
    )
    if len(trained.embeddings):  # without weight decay, which would also shrink tokens that a batch does not contain
        encoders.append({"params": list(trained.embeddings.parameters()), "weight_decay": 0.0})
    return denoiser, encoders


def at_rate(parameters: Sequence, rate: float) -> Groups:
    """Return parameter groups with their learning rates: `rate` times the factor of each group.

    `parameters`: parameters, which become one group, or groups.
    """
    groups: Sequence = parameters if isinstance(parameters[0], dict) else [{"params": list(parameters)}]
    return [{**group, "lr": rate * group.get(FACTOR, 1)} for group in groups]
