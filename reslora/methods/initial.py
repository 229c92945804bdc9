"""PEFT's initializations that subtract the adapter's initial update from the frozen weight: PiSSA and OLoRA.

After `init_lora_weights="pissa"` or `"olora"`, the frozen weight of a layer is `W - s B_0 A_0`, and A_0 and B_0 are its
initial factors (Meng et al., 2024, arXiv 2404.02948; Büyükakyüz, 2024, arXiv 2406.01775). The layer stores A_0 and B_0
as a part of the adapter. With them, a resumed run gets the same frozen weights, and the trained adapter becomes plain
LoRA of rank 2 r on W, as with PEFT's `path_initial_model_for_weight_conversion`.

Its factors are `[B - B_0, B_0] [A; A - A_0]`, whose product is that of PEFT's `[B, -B_0] [A; A_0]`. PEFT's update is a
small difference of large products, which loses digits in half precision. The former is exactly zero at the start.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .. import ranks
from ..attributes import override_attributes
from ..linking import base_model, lora_layers
from ..merging import Merged
from .controls import DEFAULT

INITIAL = ("lora_initial_A", "lora_initial_B")
"""Attributes of a LoRA layer with A_0 and B_0, by adapter; PEFT and checkpoints treat the initial factors as parts of
the adapter.
"""


def store(model: nn.Module) -> None:
    """Store the factors that PEFT has just initialized, in at least float32; the stored factors are not trained."""
    for layer in lora_layers(base_model(model), DEFAULT).values():
        for part, name in zip((layer.lora_A, layer.lora_B), INITIAL, strict=True):
            weight = part[DEFAULT].weight.detach()
            value = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            setattr(layer, name, nn.ParameterDict({DEFAULT: nn.Parameter(value, requires_grad=False)}))
        layer.other_param_names = (*layer.other_param_names, *INITIAL)


def factors_of(layer: nn.Module) -> list[nn.Parameter]:
    """Return A_0 and B_0 of a layer; none if the layer's frozen weight is unchanged."""
    return [getattr(layer, name)[DEFAULT] for name in INITIAL if hasattr(layer, name)]


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the layers whose frozen weight lacks the initial update, by name."""
    return {name: layer for name, layer in base_model(model).named_modules() if factors_of(layer)}


def _update(layer: LoraLayer, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `s B A`, in the shape of the frozen weight; computed as PEFT does, so that it has the same bits."""
    product = layer.scaling[DEFAULT] * up @ down
    return product.T if layer.fan_in_fan_out else product


def _add(layer: LoraLayer, value: torch.Tensor) -> None:
    weight = layer.get_base_layer().weight
    weight.data.copy_(weight.to(torch.promote_types(weight.dtype, torch.float32)) + value)


@contextmanager
def frozen_weights_follow(model: nn.Module) -> Iterator[None]:
    """Load other initial factors inside this context; afterwards the frozen weights are changed by the difference.

    Frozen weights stay bit for bit the same if the factors do.
    """
    before = [(layer, [value.clone() for value in factors_of(layer)]) for layer in layers_of(model).values()]
    yield
    with torch.no_grad():
        for layer, old in before:
            if not all(map(torch.equal, old, factors_of(layer))):
                _add(layer, _update(layer, *old) - _update(layer, *factors_of(layer)))


@contextmanager
def untrained(layer: nn.Module) -> Iterator[None]:
    """Use the initial factors inside this context; a layer in eval mode then computes what its base layer computed
    before training.
    """
    with ExitStack() as stack:
        for part, value in zip((layer.lora_A, layer.lora_B), factors_of(layer), strict=True):
            stack.enter_context(override_attributes(part[DEFAULT], weight=value))
        yield


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """Add the initial update to the frozen weights again, turn the adapter into plain LoRA of rank 2 r, in place.

    Returns the model. Does nothing if the initialization left the frozen weights unchanged.
    """
    base, found = base_model(model), layers_of(model)
    for layer in found.values():
        a, b = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
        initial_a, initial_b = factors_of(layer)
        _add(layer, _update(layer, initial_a, initial_b))
        factors = Merged(torch.cat([a, a - initial_a]), torch.cat([b - initial_b, initial_b], dim=1))
        ranks.write(layer, ranks.prepared(layer, factors, DEFAULT), DEFAULT)
        for name in INITIAL:
            delattr(layer, name)
        layer.other_param_names = tuple(name for name in layer.other_param_names if name not in INITIAL)
    if found:
        ranks.declare(base, found, DEFAULT)
        base.peft_config[DEFAULT].init_lora_weights = True  # of a copy that `declare` has made
    return model
