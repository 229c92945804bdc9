"""PEFT's conversion of other adapters to plain LoRA, which more programs read, and its error."""

import math
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, convert_to_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint import PEFT_PREFIX
from ..export import PEFT_FILE, Factors, lora_config, merged_value
from ..io import replacing, write_tensors
from ..linking import base_model
from ..tracing import meta_copy
from .adapters import attach, remove_adapters
from .controls import DEFAULT
from .updates import has_updates

Converted = tuple[LoraConfig, dict[str, torch.Tensor]]
"""A LoRA's configuration, and its tensors by the names of the base model's layers."""


def is_plain(model: nn.Module) -> bool:
    """Return whether the model's adapter is LoRA, without changes such as DoRA's."""
    found = [layer for layer in base_model(model).modules() if isinstance(layer, BaseTunerLayer)]
    lora = isinstance(base_model(model).peft_config[DEFAULT], LoraConfig) and not has_updates(model)
    return lora and all(layer.lora_variant.get(DEFAULT) is None for layer in found)


def convert(model: nn.Module, rank: int) -> tuple[Converted, float] | None:
    """Return the LoRA of rank `rank` that is nearest to a model's adapter, and its error; None if PEFT cannot convert.

    The rank is at most the smallest dimension of an adapted layer. The error is the norm of the difference between
    the changes of the weights by the LoRA and by the adapter, over all layers, relative to the norm of the adapter's.
    """
    base = base_model(model)
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        if not (layer.supports_lora_conversion(DEFAULT) and weight.dim() == 2 and weight.is_floating_point()):
            return None
    rank = min(rank, *(min(layer.get_base_layer().weight.shape) for layer in layers.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that updates are configured as LoRA
        config, tensors = convert_to_lora(base, rank, DEFAULT)
    # In a module that is trained completely, PEFT names each tensor by the last part of the tensor's name only.
    tensors = {name: value for name, value in tensors.items() if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            state = module.modules_to_save[DEFAULT].state_dict()
            tensors |= {f"{name}.{key}": value for key, value in state.items()}
    difference = total = 0.0
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.detach().double()
        change = merged_value(layer, "weight", weight) - weight
        down, up = (tensors[f"{name}.lora_{factor}.weight"].to(change) for factor in "AB")
        lora = (up @ down).T if isinstance(layer.get_base_layer(), Conv1D) else up @ down
        difference += float((change - lora).square().sum())
        total += float(change.square().sum())
    return (config, tensors), math.sqrt(difference / total) if total else 0.0


def write_converted(model: nn.Module, converted: Converted, directory: Path) -> None:
    """Write the converted LoRA of a model in PEFT's format, with the modules that the model trains completely."""
    config, tensors = converted
    config.task_type, config.inference_mode = base_model(model).peft_config[DEFAULT].task_type, True
    with replacing(directory) as temporary:
        config.save_pretrained(str(temporary))
        named = {PEFT_PREFIX + name: value for name, value in tensors.items()}
        write_tensors(temporary / PEFT_FILE, named, {"format": "pt"})


def with_lora(model: nn.Module, converted: Converted) -> nn.Module:
    """Return a copy of a model's layers, without their weights, that has the converted LoRA in place of the adapter."""
    twin, tensors = meta_copy(base_model(model)), converted[1]
    remove_adapters(twin)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    factors = {name: Factors(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], 1.0) for name in names}
    attach(twin, lora_config(factors), in_place=True)
    for name, (down, up, _) in factors.items():
        layer = twin.get_submodule(name)
        layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight = nn.Parameter(down), nn.Parameter(up)
    return twin
