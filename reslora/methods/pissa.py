"""PiSSA (Meng et al., 2024, arXiv 2404.02948): LoRA that starts from the principal singular vectors of each weight.

PEFT's `init_lora_weights="pissa"` subtracts the initial product from the frozen weight: `(W - s B_0 A_0) x + s B A x`.
Here the weight stays as it is, and the layer computes the same function as `W x + s (B A - B_0 A_0) x`, with the
initial factors frozen. So other methods can share the base model, disabled adapters leave the base model, and the
trained adapter is plain LoRA of rank 2 r on that base.

Its factors are `[B - B_0, B_0] [A; A - A_0]`, whose product is that of `[B, -B_0] [A; A_0]`. The latter is a small
difference of large products, which loses digits in half precision. The former is exactly zero at the start.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from .. import ranks
from ..chains import base_model, lora_layers
from ..guards import refuse_unknown_peft
from ..merging import Merged
from ..model import base_weight
from ..shortcuts.base import passes
from .controls import DEFAULT

INITIAL = ("lora_initial_A", "lora_initial_B")
"""Attributes of a LoRA layer with A_0 and B_0, by adapter; PEFT and checkpoints treat them as parts of the adapter."""


class Pissa(LoraVariant):
    """`W x + s (B A D(x) - B_0 A_0 x)`, with dropout D: LoRA without the product of its initial factors."""

    @staticmethod
    def forward(
        module: LoraLayer, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return the layer's output (... x q); `x` is its input (... x p), `result` the output of the frozen layer."""
        initial_a, initial_b = (getattr(module, name)[active_adapter] for name in INITIAL)
        lora_a, dropout = module.lora_A[active_adapter], module.lora_dropout[active_adapter]
        down = lora_a(dropout(x))
        change = F.linear(x, lora_a.weight - initial_a) if passes(dropout) else down - F.linear(x, initial_a)
        hidden = module.scaling[active_adapter] * torch.cat([down, change], dim=-1)
        up = torch.cat([module.lora_B[active_adapter].weight - initial_b, initial_b], dim=1)
        return result + F.linear(hidden, up)


def is_pissa(config: PeftConfig) -> bool:
    """Return whether a configuration asks for PEFT's PiSSA initialization."""
    return getattr(config, "init_lora_weights", None) == "pissa"


def plain(config: LoraConfig) -> LoraConfig:
    """Return the configuration of LoRA with PEFT's default initialization, which leaves the frozen weights alone."""
    config = copy.copy(config)
    config.init_lora_weights = True
    return config


@torch.no_grad()
def put_on(model: nn.Module) -> None:
    """Start the plain LoRA of a model as PiSSA, in place, from the singular value decomposition of each weight.

    `s B_0 A_0` is the best rank-r approximation of W, with equal singular values in both factors, as in PEFT. The
    factors are in float32, or in float64 for weights in float64.

    Raises `RuntimeError` if the installed PEFT does not call the variants of its LoRA layers.
    """
    refuse_unknown_peft()
    for layer in lora_layers(base_model(model), DEFAULT).values():
        weight, rank = base_weight(layer), layer.r[DEFAULT]
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        root = (s[:rank] / layer.scaling[DEFAULT]).sqrt()
        start = root[:, None] * v[:rank], u[:, :rank] * root
        for part, name, value in zip((layer.lora_A, layer.lora_B), INITIAL, start, strict=True):
            part[DEFAULT].weight.data = value.clone(memory_format=torch.contiguous_format)
            setattr(layer, name, nn.ParameterDict({DEFAULT: nn.Parameter(value, requires_grad=False)}))
        layer.other_param_names = (*layer.other_param_names, *INITIAL)
        layer.lora_variant[DEFAULT] = Pissa()


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """Turn PiSSA into plain LoRA of rank 2 r in place, and return the model; does nothing for another method."""
    base = base_model(model)
    found = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and isinstance(layer.lora_variant.get(DEFAULT), Pissa)
    }
    for layer in found.values():
        a, b = layer.lora_A[DEFAULT].weight, layer.lora_B[DEFAULT].weight
        initial_a, initial_b = (getattr(layer, name)[DEFAULT] for name in INITIAL)
        factors = Merged(torch.cat([a, a - initial_a]), torch.cat([b - initial_b, initial_b], dim=1))
        ranks.write(layer, ranks.prepared(layer, factors, DEFAULT), DEFAULT)
        del layer.lora_variant[DEFAULT]
        for name in INITIAL:
            delattr(layer, name)
        layer.other_param_names = tuple(name for name in layer.other_param_names if name not in INITIAL)
    if found:
        ranks.declare(base, found, DEFAULT)
    return model
