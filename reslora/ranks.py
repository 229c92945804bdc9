"""Write ranks and alphas into layers and PEFT's configuration, so that PEFT can load the saved adapter."""

import copy
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import nn

from .checks import is_subtracted
from .merging import Merged


def changes_base(config: LoraConfig) -> bool:
    """Return whether the adapter's initialization changed the frozen weights by an amount that depends on the rank."""
    return is_subtracted(config.init_lora_weights)


def prepared(layer: LoraLayer, merged: Merged, adapter_name: str) -> Merged:
    """Return the merged factors on the device and in the dtype of the layer's current factors.

    The memory for the merged factors is allocated here, so that `write` allocates none.
    """
    factors = []
    with torch.inference_mode(False):  # tensors created in a caller's inference mode can never be trained
        for modules, value in ((layer.lora_A, merged.a), (layer.lora_B, merged.b)):
            weight = modules[adapter_name].weight
            value = value.to(weight.device, weight.dtype).contiguous()
            factors.append(value.clone() if value.is_inference() else value)
    return dataclasses.replace(merged, a=factors[0], b=factors[1])


def write(layer: LoraLayer, merged: Merged, adapter_name: str) -> None:
    """Set the layer's A and B to `prepared` factors.

    If the rank changes, new linear layers replace the A and B modules, in the same training mode.
    """
    for modules, value in ((layer.lora_A, merged.a), (layer.lora_B, merged.b)):
        old = modules[adapter_name]
        if old.weight.shape == value.shape:
            old.weight.data.copy_(value)
            continue
        new = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(value, requires_grad=old.weight.requires_grad)
        modules[adapter_name] = new.train(old.training)


def declare(base: nn.Module, layers: dict[str, LoraLayer], adapter_name: str) -> None:
    """Write changed ranks and alphas into the layers and, by full name, into PEFT's configuration.

    PEFT uses the first pattern that matches a layer, and sorts the patterns when it writes the file. Therefore, if the
    configuration already has patterns, each layer gets its own entry. An older pattern is kept only if it follows all
    new entries in the sorted order.
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
        alpha = whole(nominal(layer, adapter_name) * _divisor(layer, adapter_name, rank))
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
    # A copy, because PEFT stores the caller's object, which other adapters may share.
    config = base.peft_config[adapter_name] = copy.copy(base.peft_config[adapter_name])
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    config.rank_pattern = _patterns(ranks, changed, config.r, config.rank_pattern)
    config.alpha_pattern = _patterns(alphas, changed, config.lora_alpha, config.alpha_pattern)
    if config.init_lora_weights == "orthogonal":  # PEFT repeats it when it loads the adapter, and refuses odd ranks
        config.init_lora_weights = True


# -- scales that differ from alpha ------------------------------------------------------------------------------------

# `set_scale`, which diffusers' `set_adapters` calls with its weights, changes only a layer's `scaling`, not its alpha.


def nominal(layer: LoraLayer | LycorisLayer, adapter_name: str) -> float:
    """Return the scaling that follows from a layer's rank and alpha."""
    rank = layer.r[adapter_name]
    alpha = (layer.lora_alpha if isinstance(layer, LoraLayer) else layer.alpha)[adapter_name]
    if hasattr(layer, "lora_E"):  # AdaLoRA divides by its current rank in the forward pass
        return alpha if alpha > 0 else rank
    return alpha / _divisor(layer, adapter_name, rank)


def rescaled(layers: Mapping[str, LoraLayer | LycorisLayer], adapter_name: str) -> dict[str, float]:
    """Return layer name -> scaling, for the layers whose scaling differs from that given by rank and alpha."""
    found = {name: float(layer.scaling[adapter_name]) for name, layer in layers.items()}
    return {name: scale for name, scale in found.items() if not _close(scale, nominal(layers[name], adapter_name))}


def rescale(layers: Mapping[str, LoraLayer], scaling: Mapping[str, float], adapter_name: str) -> None:
    """Set the scaling of the layers in `scaling`, which `rescaled` returned.

    All other layers get the scaling that rank and alpha give.
    """
    for name, layer in layers.items():
        scale = scaling.get(name, nominal(layer, adapter_name))
        if not _close(float(layer.scaling[adapter_name]), scale):
            layer.scaling[adapter_name] = scale


def declare_scaling(config: PeftConfig, base: nn.Module, adapter_name: str) -> None:
    """Set the alphas in a configuration that will be saved, so that the alphas include scalings changed by `set_scale`.

    Raises `ValueError` if the configuration cannot express the scalings, because loading it would give another model.
    """
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (LoraLayer, LycorisLayer)) and adapter_name in module.scaling
    }
    scaled = rescaled(layers, adapter_name)
    if not scaled:
        return
    if config.peft_type != PeftType.LORA:
        raise _not_in_files(scaled, f"a {config.peft_type.value} configuration")
    if changes_base(config):  # loading repeats the initialization, which can depend on alpha
        raise _not_in_files(scaled, f"init_lora_weights={config.init_lora_weights!r}")
    alphas = {name: layer.lora_alpha[adapter_name] for name, layer in layers.items()}
    alphas |= {
        name: whole(scale * _divisor(layers[name], adapter_name, layers[name].r[adapter_name]))
        for name, scale in scaled.items()
    }
    # PEFT's patterns match only the outer one of nested layers, so an inner layer cannot have another alpha.
    fixed = {
        alpha for name, alpha in alphas.items()
        if "base_layer" in name.split(".") or type(layers[name]).__name__ == "ParamWrapper"
    }  # fmt: skip
    if len(fixed) > 1:
        raise _not_in_files(scaled, "nested layers, which all have one alpha")
    common = fixed.pop() if fixed else commonest(alphas.values())
    config.alpha_pattern = _patterns(alphas, {}, common, config.alpha_pattern)
    config.lora_alpha = common


def _not_in_files(scaled: Mapping[str, float], where: str) -> ValueError:
    name, scale = next(iter(scaled.items()))
    return ValueError(
        f"{name} has the scale {scale:g}, which differs from that of its alpha, and PEFT's files cannot store it with "
        f"{where}: reset the scale (set_adapters, set_scale), or use export_merged"
    )


def _divisor(layer: LoraLayer | LycorisLayer, adapter_name: str, rank: int) -> float:
    """Return the number by which alpha is divided: the rank, or for rsLoRA its square root."""
    return math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(adapter_name) else rank


def _close(scale: float, other: float) -> bool:
    return math.isclose(scale, other, rel_tol=1e-6)  # hot-swapping keeps scales in float32


def _patterns(values: dict[str, float], changed: dict[str, int], default: float, older: dict) -> dict:
    own = {
        "^" + re.escape(name): value for name, value in values.items() if older or name in changed or value != default
    }
    last = max(own, default="^")
    return {**own, **{pattern: value for pattern, value in older.items() if pattern > last}}


def commonest(values: Iterable[float]) -> Any:
    """Return the most frequent value; of equally frequent values the first."""
    return Counter(values).most_common(1)[0][0]


def whole(value: float) -> float:
    """Return a whole number as an int, any other value unchanged."""
    return int(value) if float(value).is_integer() else value
