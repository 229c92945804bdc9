"""Measure the scale of shortcut terms at initialization, to calibrate the control methods (see `controls`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..chains import base_model, before_each, lora_layers
from ..config import ResLoraConfig
from ..model import connect, disconnect
from ..shortcuts.base import Shortcut, rows
from ..tracing import evaluating
from ..wiring import connected
from .controls import DEFAULT, Settings
from .registry import METHODS, Method


@contextmanager
def gauged(
    method: str, model: nn.Module, shortcuts: ResLoraConfig, example_inputs: dict | None = None
) -> Iterator[Gauge]:
    """Connect a model with plain LoRA inside this context, and yield a `Gauge` that measures its forward passes.

    The model is in eval mode and connected by `shortcuts`; if the method is a placebo of a shortcut, that shortcut
    replaces `shortcuts.shortcut`. Raises `ValueError` as `reslora.connect` does.
    """
    row = METHODS[method]
    shortcuts = replace(shortcuts, shortcut=row.placebo or shortcuts.shortcut)
    plan, base = connect(model, shortcuts, example_inputs=example_inputs), base_model(model)
    neighbours = {
        block.name: len(before)
        for chain in plan
        for block, before in zip(chain, before_each(len(chain), shortcuts.reach), strict=True)
    }
    connected(base, DEFAULT).wires.observer = gauge = Gauge(row, base, neighbours)
    try:
        with torch.no_grad(), evaluating(base):
            yield gauge
    finally:
        disconnect(model)


@dataclass
class Gauge:
    """Sums of squares for each block: of h (the input of its B), of the shortcut terms in h, and of A_n x_n."""

    method: Method
    base: nn.Module
    neighbours: dict[str, int]
    """Block name -> number of earlier blocks whose terms it adds."""
    squares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))

    def __call__(self, variant: Shortcut, x: torch.Tensor, own: torch.Tensor, handed: torch.Tensor | None) -> None:
        """Record one forward pass of a block: its input `x`, its own A x (`own`) and the shortcut terms (`handed`).

        For the `block` shortcut, `own` and `handed` are the stacked A and the stacked B.
        """
        if variant.carries:
            added = torch.zeros_like(own) if handed is None else handed
            h = own + added
        else:
            h = rows(x) @ own.to(x).t()
            own, added = h.tensor_split([len(own) // (1 + len(variant.others()))], dim=1)
        for place, value in enumerate((h, added, own)):
            dtype = torch.promote_types(value.dtype, torch.float32)
            self.squares[variant.name][place] += torch.linalg.vector_norm(value, dtype=dtype).item() ** 2

    def settings(self, seed: int) -> Settings:
        """Return the matched alphas or the rotations, for `put_on`; rotations depend on `seed` and the block's name."""
        layers = lora_layers(self.base, DEFAULT)
        if self.method.matched:
            squares = self.squares.items()
            alphas = {name: layers[name].lora_alpha[DEFAULT] * _ratio(h, own) for name, (h, _, own) in squares}
            return {"alphas": alphas}
        rotations = {}
        for name, (_, added, own) in self.squares.items():
            if added:
                count = self.neighbours[name]
                rotations[name] = [count, _ratio(added, own) / math.sqrt(max(1, count))]
        return {"seed": seed, "rotations": rotations}


def _ratio(square: float, of: float) -> float:
    """Return `sqrt(square / of)`; 1 if `of` is zero."""
    return math.sqrt(square / of) if of else 1.0
