"""Control methods calibrated before the first step: LoRA at the scale of a shortcut, and placebos.

with gauged("lora_matched", model, ResLoraConfig(shortcut="middle", pre_num=4)) as gauge:      # `model` has plain LoRA
    for batch in batches:
        model(**batch)
put_on(model, gauge.settings(seed=0))             # `save_adapter` stores them in the file header
merged(model)                                     # after training: convert to plain LoRA

A block's B has the input h (r wide), and the block's output is s B h. |.| is the root mean square over all tokens of
all batches. B is zero at initialization, and so is the output.

`lora_matched`: a layer's alpha is multiplied by `|h| / |A_n x_n|`, where h is the input of B with the shortcut:

| shortcut | h |
|---|---|
| `input` | `A_n (x_n + x_{n-1})`; `2 A_n x_n` in a head that repeats its input |
| `middle` | `sum_{k=0..m} A_{n-k} x_{n-k}` |
| `block` | `A_n x_n, ..., A_{n-m} x_n` side by side, which `[B_n, ..., B_{n-m}]` multiplies |

The first gradient of B is `s d h^T`, where d is the gradient of the block's output, and its size is `s |d| |h|`. For
`block` this is the gradient of all its B together, about sqrt(m + 1) times LoRA's. So the first step changes the
block's output as much as with the shortcut. A shared B of `block` also receives gradients from other blocks, which no
scale can reproduce.

Placebos: rotations of the block's own input replace the shortcut terms of its m earlier blocks. h is
`A_n (x_n + c sum_{k=1..m} R_k x_n)`, with `c = |shortcut terms in h| / (sqrt(m) |A_n x_n|)`. The added terms are as
large as the shortcut's, because a random A maps a rotated input to the same norm as the input. In the bundled U-Net the
ratio in c varies from 0.4 to 4 within a chain, so it is measured. A head has the same h as with the shortcut.
"""

from __future__ import annotations

import random
import re
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..chains import base_model, lora_layers

DEFAULT = "default"  # name of the adapter, PEFT's default
ROTATED = ".parametrizations.weight.original"
"""Suffix of the name of a rotated A in a state dict."""

Settings = dict[str, Any]
"""`{"alphas": {layer: matched alpha}}`, or `{"seed": seed, "rotations": {layer: [m, c]}}`.

m and c are those of `Rotations`.
"""


def put_on(model: nn.Module, settings: Settings) -> None:
    """Set alphas or rotations on a model with plain LoRA; they replace those of an earlier call."""
    base = base_model(model)
    layers, config = lora_layers(base, DEFAULT), base.peft_config[DEFAULT]
    _take_off(base, keep=False)
    for name, (count, scale) in settings.get("rotations", {}).items():
        lora_a = layers[name].lora_A[DEFAULT]
        rotations = Rotations(lora_a.weight, count, scale, f"{settings['seed']} {name}")
        parametrize.register_parametrization(lora_a, "weight", rotations)
    for name, alpha in settings.get("alphas", {}).items():
        layers[name].lora_alpha[DEFAULT], layers[name].scaling[DEFAULT] = alpha, alpha / layers[name].r[DEFAULT]
        config.alpha_pattern["^" + re.escape(name)] = alpha
    base._control = settings


def settings_of(model: nn.Module) -> Settings | None:
    """Return the settings that `put_on` applied to a model; None without any."""
    return vars(base_model(model)).get("_control")


def merged(model: nn.Module) -> nn.Module:
    """Convert a placebo to plain LoRA in place, by writing the rotated A (see `Rotations`), and return the model."""
    _take_off(base_model(model), keep=True)
    return model


def _take_off(base: nn.Module, keep: bool) -> None:
    """Remove rotations, after folding them into A if `keep` is set."""
    for module in list(base.modules()):
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], Rotations):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep)
            vars(base).pop("_control", None)


class Rotations(nn.Module):
    """Parametrization of A (r x p) as `A (I + c sum_{k=1..m} R_k)`, so that A multiplies `x + c sum_k R_k x`.

    Each R_k is a random signed permutation: it is orthogonal, two vectors of p values store it, and R_k x is
    uncorrelated with x on average over seeds. For m = 0, R is a single identity.
    """

    def __init__(self, weight: torch.Tensor, count: int, scale: float, key: str) -> None:
        super().__init__()
        self.scale = scale
        width, draws = weight.shape[1], torch.Generator().manual_seed(random.Random(key).getrandbits(63))
        places = [torch.randperm(width, generator=draws) for _ in range(count)] or [torch.arange(width)]
        signs = (
            torch.randint(0, 2, (len(places), width), generator=draws) * 2.0 - 1.0 if count else torch.ones(1, width)
        )
        # Not buffers, which checkpoints would contain: the seed determines them.
        self.places, self.signs = torch.stack(places).to(weight.device), signs.to(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Rotations:
        self.places, self.signs = fn(self.places), fn(self.signs)
        return super()._apply(fn, recurse)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `A (I + c sum_k R_k)` (r x p)."""
        return weight + self.scale * (weight[:, self.places] * self.signs).sum(1)
