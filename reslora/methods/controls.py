"""The control method `lora_matched`, calibrated before the first step: LoRA at the scale of a shortcut.

with gauged(model, ResLoraConfig(shortcut="middle", pre_num=4)) as gauge:      # `model` has plain LoRA
    for batch in batches:
        model(**batch)
put_on(model, gauge.settings())                   # `save_adapter` stores them in the file header

A block's B has the input h (r wide), and the block's output is s B h. |.| is the root mean square over all tokens of
all batches. B is zero at initialization, and so is the output.

A layer's alpha is multiplied by `|h| / |A_n x_n|`, where h is the input of B with the shortcut:

| shortcut | h |
|---|---|
| `input` | `A_n (x_n + x_{n-1})`; `2 A_n x_n` in a head that repeats its input |
| `middle` | `sum_{k=0..m} A_{n-k} x_{n-k}` |
| `block` | `A_n x_n, ..., A_{n-m} x_n` side by side, which `[B_n, ..., B_{n-m}]` multiplies |

The first gradient of B is `s d h^T`, where d is the gradient of the block's output, and its size is `s |d| |h|`. For
`block` this is the gradient of all its B together, about sqrt(m + 1) times LoRA's. So the first step changes the
block's output as much as with the shortcut. A shared B of `block` also receives gradients from other blocks, which no
scale can reproduce.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..linking import base_model, lora_layers

DEFAULT = "default"  # name of the adapter, PEFT's default

Settings = dict[str, Any]
"""`{"alphas": {layer: matched alpha}}`"""


def put_on(model: nn.Module, settings: Settings) -> None:
    """Set alphas on a model with plain LoRA; they replace those of an earlier call."""
    base = base_model(model)
    layers, config = lora_layers(base, DEFAULT), base.peft_config[DEFAULT]
    for name, alpha in settings["alphas"].items():
        layers[name].lora_alpha[DEFAULT], layers[name].scaling[DEFAULT] = alpha, alpha / layers[name].r[DEFAULT]
        config.alpha_pattern["^" + re.escape(name)] = alpha
    base._control = settings


def settings_of(model: nn.Module) -> Settings | None:
    """Return the settings that `put_on` applied to a model; None without any."""
    return vars(base_model(model)).get("_control")
