"""Ranks and scales after a merge: into the layers and PEFT's configuration, so that a saved adapter loads."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from .merging import Merged

# Initialisations that move a part of the frozen weight into the adapter, as much as the rank says. A reader repeats
# them to have the same frozen weight; with another rank it would get another one.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(config: LoraConfig) -> bool:
    """Whether the adapter's initialisation has changed the frozen weights by an amount that depends on the rank."""
    return isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(CHANGES_BASE)


def ready(layer: LoraLayer, merged: Merged, adapter_name: str) -> Merged:
    """The new factors with the device and dtype of the old ones: whatever of a merge takes memory is done here."""
    factors = []
    with torch.inference_mode(False):  # a caller's: what is made inside of it can never be trained
        for modules, value in ((layer.lora_A, merged.a), (layer.lora_B, merged.b)):
            weight = modules[adapter_name].weight
            value = value.to(weight.device, weight.dtype).contiguous()
            factors.append(value.clone() if value.is_inference() else value)
    return dataclasses.replace(merged, a=factors[0], b=factors[1])


def write(layer: LoraLayer, merged: Merged, adapter_name: str) -> None:
    """Puts factors that are `ready` in place; a changed rank takes new linear layers of the old mode."""
    for modules, value in ((layer.lora_A, merged.a), (layer.lora_B, merged.b)):
        old = modules[adapter_name]
        if old.weight.shape == value.shape:
            old.weight.data.copy_(value)
            continue
        new = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(value, requires_grad=old.weight.requires_grad)
        modules[adapter_name] = new.train(old.training)


def declare(config: LoraConfig, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Where ranks changed: writes rank and alpha into the layers and, by full name, into PEFT's configuration.

    PEFT takes the first pattern that matches, and sorts them when it writes the file. So where there were patterns each
    layer gets an entry of its own, and older ones are kept only if they sort behind all of these.
    """
    changed = {
        name: layer.lora_A[adapter_name].weight.shape[0]
        for name, layer in layers.items()
        if adapter_name in layer.lora_A and layer.lora_A[adapter_name].weight.shape[0] != layer.r[adapter_name]
    }
    if not changed:
        return
    for name, rank in changed.items():
        layer = layers[name]
        root = math.sqrt if layer.use_rslora[adapter_name] else float
        nominal = layer.lora_alpha[adapter_name] / root(layer.r[adapter_name])
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, _alpha(nominal, root(rank))
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    config.rank_pattern = _patterns(ranks, changed, config.r, config.rank_pattern)
    config.alpha_pattern = _patterns(alphas, changed, config.lora_alpha, config.alpha_pattern)


def _patterns(values: dict[str, float], changed: dict[str, int], default: float, older: dict) -> dict:
    own = {
        "^" + re.escape(name): value for name, value in values.items() if older or name in changed or value != default
    }
    last = max(own, default="^")
    return {**own, **{pattern: value for pattern, value in older.items() if pattern > last}}


def _alpha(scaling: float, root: float) -> float:
    """The alpha with `alpha / root == scaling` but for rounding; a whole number, as users write it, where it is one."""
    return whole(scaling * root)


def whole(value: float) -> float:
    """A whole number as one."""
    return int(value) if float(value).is_integer() else value
